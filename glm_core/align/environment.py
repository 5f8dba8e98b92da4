"""Where a trace was recorded."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

import glm_core
from glm_core.backends.base import Backend


def environment(backend: Backend) -> dict[str, Any]:
    """Machine, CPU, versions, threads, and how far the backend was ever verified."""
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "glm_core": glm_core.__version__,
        "backend": backend.name,
        "device_type": backend.device_type,
        "verified": backend.verified,
    }


def cpu_name() -> str:
    """The model's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())
