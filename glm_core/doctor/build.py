"""Prepares an examination before any kernel is loaded: its folder is free, and on request the GPU
kernels are built for the card in this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from glm_core.errors import GlmCoreError

CHOICES = ("cuda", "rocm")
SOURCES = Path(__file__).resolve().parents[2]
"""the clone that this package lies in; an installed package has no sources"""


class Build(NamedTuple):
    """What a build took and printed."""

    command: str
    seconds: float
    log: str


def build(backend: str, seconds: float) -> Build:
    """Installs this clone again with the kernels of a GPU backend, for the first card's
    architecture alone, in at most so many seconds. Raises GlmCoreError where there is nothing to
    build, no source, no card, or where the compiler fails."""
    if backend not in CHOICES:
        raise GlmCoreError(
            f"doctor: --build builds the kernels of {' and '.join(CHOICES)}; leave it out for "
            f"{backend}"
        )
    if not (SOURCES / "setup.py").exists():
        raise GlmCoreError(
            f"doctor: --build needs the sources, and {SOURCES} has no setup.py; run it in a clone "
            "after pip install -e ."
        )
    chosen = {"GLM_CORE_BUILD": backend, "GLM_CORE_ARCHES": architecture(backend)}
    pip = ["pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(SOURCES)]
    command = " ".join([*(f"{name}={value}" for name, value in chosen.items()), *pip])
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *pip],
            env=os.environ | chosen,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise GlmCoreError(
            f"doctor: the build took longer than the {seconds:.0f} s of --minutes; run {command} "
            "first, or give more --minutes"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise GlmCoreError(f"doctor: the build failed: {reason}; for all of it run {command}")
    return Build(command, time.perf_counter() - begin, done.stdout)


def refuse_folder_in_use(folder: Path) -> None:
    """Raises GlmCoreError where the folder of an examination holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GlmCoreError(f"doctor: {folder} is not empty; pass a new folder as --out")


def architecture(backend: str) -> str:
    """Returns what GLM_CORE_ARCHES calls the first card: 90, or gfx90a. Another process asks, since
    asking loads kernels. Raises GlmCoreError where torch sees no card."""
    code = (
        "import json; from glm_core.backends.cuda import probe; facts = probe.facts(); "
        f"print(json.dumps([probe.{backend}(facts), facts.capability]))"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if reply.returncode:
        raise GlmCoreError(f"doctor: cannot look for a card: {reply.stderr.strip()[-200:]}")
    (usable, reason), capability = json.loads(reply.stdout.splitlines()[-1])
    if not usable:
        raise GlmCoreError(f"doctor: no card to build for: {reason}")
    return str(capability).removeprefix("sm_")
