"""Loads the compiled GPU kernels: the CUDA half of the operators that the CPU extension
declares."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cpu import built


def load(module: str, choice: str) -> str:
    """Loads the kernels of `module`, built by GLM_CORE_BUILD=`choice`; returns why they cannot run
    here, or ''."""
    build = f"GLM_CORE_BUILD={choice} pip install --no-build-isolation -e ."
    if not (state := cpu.probe()).ok:
        return f"the operators are not loaded: {state.reason}"
    if reason := built.trouble(Path(__file__).parents[1] / choice, build):
        return f"its kernels are {reason}"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"its kernels do not fit torch {torch.__version__} ({error}); rebuild with: {build}"
    toolkit = torch.ops.glm_core.gpu_toolkit()
    return _mismatch(toolkit, getattr(torch.version, choice if choice == "cuda" else "hip"), build)


def _mismatch(toolkit: str, of_torch: str | None, build: str) -> str:
    if of_torch is None or toolkit.partition(".")[0] == of_torch.partition(".")[0]:
        return ""
    return (
        f"its kernels were built with toolkit {toolkit}, torch {torch.__version__} with "
        f"{of_torch}; use toolkit {of_torch.partition('.')[0]}.x, rebuild with: {build}"
    )
