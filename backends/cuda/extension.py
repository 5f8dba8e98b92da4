"""Loads the compiled GPU kernels: the CUDA half of the operators that the CPU extension
declares."""

from __future__ import annotations

import importlib

import torch

from glm_core.backends.cpu import backend as cpu


def load(module: str, choice: str) -> str:
    """Loads the kernels of `module`, built by GLM_CORE_BUILD=`choice`; returns why they cannot run
    here, or ''."""
    build = f"GLM_CORE_BUILD={choice} pip install -e . --no-build-isolation builds them"
    if not (state := cpu.probe()).ok:
        return f"the operators are not loaded: {state.reason}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"its kernels are not built; {build}"
    except ImportError as error:
        return f"its kernels do not fit torch {torch.__version__} ({error}); {build} again"
    built, toolkit = torch.ops.glm_core.gpu_built_for().split()
    here = torch.__version__.partition("+")[0]
    if built != here:
        return f"its kernels were built for torch {built}, this is {here}; {build} again"
    return _mismatch(toolkit, getattr(torch.version, choice if choice == "cuda" else "hip"), build)


def _mismatch(toolkit: str, of_torch: str | None, build: str) -> str:
    if of_torch is None or toolkit.partition(".")[0] == of_torch.partition(".")[0]:
        return ""
    return (
        f"its kernels were built with toolkit {toolkit}, torch {torch.__version__} with "
        f"{of_torch}; use toolkit {of_torch.partition('.')[0]}.x: {build} again"
    )
