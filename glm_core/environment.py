"""Reads every GLM_CORE_* variable, and refuses the ones that nobody reads."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from glm_core.errors import ConfigError, unknown

API_KEY = "GLM_CORE_API_KEY"
DATE = "GLM_CORE_DATE"
WATCH = "GLM_CORE_WATCH"
VARIABLES = {
    "GLM_CORE_BUILD": "what setup.py builds: auto, off, cpu, cuda or rocm",
    "GLM_CORE_ARCHES": "what GPU kernels are compiled for: 80,90 or gfx90a,gfx942",
    "GLM_CORE_ISA": "the CPU's instruction set: scalar, avx2, avx512; on Arm neon, dotprod, i8mm",
    "GLM_CORE_CACHE": "where exported models are kept, instead of .cache",
    WATCH: "the folder in which processes of glm-core launch report; launch itself sets it",
    DATE: "the day that chat templates print, as 2026-11-28; default today",
    API_KEY: "the key that clients of glm-core serve must send; empty: none",
}
BUILDS = ("auto", "off", "cpu", "cuda", "rocm")


def check() -> None:
    """Raises ConfigError that names every GLM_CORE_* variable nobody reads."""
    strange = sorted(v for v in os.environ if v.startswith("GLM_CORE_") and v not in VARIABLES)
    if strange:
        lines = (unknown("environment variable", name, VARIABLES) for name in strange)
        raise ConfigError("; ".join(lines))


def build() -> str:
    """Returns GLM_CORE_BUILD, by default auto. Raises ConfigError for anything but BUILDS."""
    choice = os.environ.get("GLM_CORE_BUILD", "auto")
    if choice not in BUILDS:
        raise ConfigError(f"GLM_CORE_BUILD={choice!r}: allowed are {', '.join(BUILDS)}")
    return choice


def arches() -> list[str]:
    """Returns GLM_CORE_ARCHES as a list, by default empty."""
    return [a.strip() for a in os.environ.get("GLM_CORE_ARCHES", "").split(",") if a.strip()]


def isa() -> str | None:
    """Returns GLM_CORE_ISA."""
    return os.environ.get("GLM_CORE_ISA")


def cache() -> Path:
    """Returns GLM_CORE_CACHE, by default .cache in the working directory."""
    return Path(os.environ.get("GLM_CORE_CACHE") or ".cache")


def api_key() -> str:
    """Returns GLM_CORE_API_KEY, by default empty."""
    return os.environ.get(API_KEY, "")


def date() -> datetime.date | None:
    """Returns GLM_CORE_DATE, None where it is not set. Raises ConfigError for what is no date."""
    value = os.environ.get(DATE)
    try:
        return datetime.date.fromisoformat(value) if value else None
    except ValueError:
        raise ConfigError(f"{DATE}={value!r}: write the day as 2026-11-28") from None


def watch() -> Path | None:
    """Returns GLM_CORE_WATCH, or None outside of glm-core launch."""
    folder = os.environ.get(WATCH)
    return Path(folder) if folder else None
