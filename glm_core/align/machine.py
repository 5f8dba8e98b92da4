"""Describes the machine and the software a trace was recorded with."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy
import torch

import glm_core
from glm_core.backends.base import Backend
from glm_core.measure.timing import cpu_name


def machine_facts(backend: Backend) -> dict[str, Any]:
    """Returns CPU, system, versions, threads, and how the backend was verified."""
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
