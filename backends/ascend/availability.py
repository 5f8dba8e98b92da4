"""Decides whether an Ascend device and a fitting torch_npu are here. If not, says why and what to
do."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path

import torch

from glm_core import versions
from glm_core.backends.base import Probe

DEVICES = Path("/dev")


def probe() -> Probe:
    """Reports all obstacles that can be seen without loading torch_npu; where there are none, loads
    it and reports the error."""
    obstacles = [fact for fact in (_package(), _device_files()) if fact]
    if not obstacles:
        obstacles = [fact for fact in (_load_error(),) if fact]
    return Probe(not obstacles, "; ".join(obstacles))


def _package() -> str:
    """Says whether torch_npu is missing or of another version than torch: torch_npu M.m is built
    for torch M.m (its own `Requires-Dist: torch==`). Returns '' where it fits."""
    wanted = versions.release(torch.__version__)
    try:
        version = metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return f"torch_npu is not installed (pip install torch-npu=={wanted})"
    if _release(version) != _release(wanted):
        return (
            f"torch_npu {version} does not fit torch {wanted} "
            f"(pip install torch-npu=={wanted}, or the torch of {'.'.join(_release(version))})"
        )
    return ""


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _device_files() -> str:
    if any(DEVICES.glob("davinci[0-9]*")):
        return ""
    return (
        "no /dev/davinci*: no Ascend device, its driver is not loaded, or the container was "
        "started without --device /dev/davinci0"
    )


def _load_error() -> str:
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # torch_npu 2.13.0 raises plain Exception for a missing CANN folder
        first = str(error).strip().splitlines()[0]
        return (
            f"torch_npu does not load: {first} "
            "(source /usr/local/Ascend/ascend-toolkit/set_env.sh, or install CANN)"
        )
    if not torch.get_device_module("npu").is_available():
        return "torch_npu sees no device (npu-smi info lists them; ASCEND_RT_VISIBLE_DEVICES)"
    return ""
