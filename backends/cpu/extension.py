"""Loads the compiled kernels and chooses the instruction set they run with."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from glm_core import environment
from glm_core.backends.base import Probe
from glm_core.backends.cpu import built, fakes
from glm_core.errors import BackendUnavailableError

BUILD = "pip install --no-build-isolation -e ."
REBUILD = f"rebuild with: {BUILD}"


def _load() -> str:
    """Loads the operators `torch.ops.glm_core.*`; returns why that failed, '' where it did not."""
    if reason := built.trouble(Path(__file__).parent, BUILD):
        return f"its C++ extension is {reason}"
    try:
        importlib.import_module("glm_core.backends.cpu._C")
    except ImportError as error:
        return f"its C++ extension does not fit torch {torch.__version__} ({error}); {REBUILD}"
    operators = torch.ops.glm_core
    if missing := [f.__name__ for f in fakes.FAKES if not hasattr(operators, f.__name__)]:
        return f"its C++ extension is older than its sources (no {missing[0]}); {REBUILD}"
    return _apply_environment()


def _apply_environment() -> str:
    name = environment.isa()
    if name is None:
        return ""
    try:
        select_isa(name)
    except ValueError as error:
        return f"GLM_CORE_ISA: {error}; unset it or choose one that this CPU has"
    return ""


def isa() -> str:
    """Returns the instruction set whose kernels run, such as scalar, avx2 or neon."""
    name: str = torch.ops.glm_core.isa()
    return name


def isas() -> list[str]:
    """Returns the instruction sets that this CPU can run, the best last."""
    names: list[str] = torch.ops.glm_core.isas()
    return names


def select_isa(name: str) -> None:
    """Runs the kernels of another instruction set from now on, in every thread. Raises ValueError
    where this CPU does not have it."""
    torch.ops.glm_core.set_isa(name)


_exact_lock = threading.Lock()
_exact_users = 0


@contextmanager
def exact() -> Iterator[None]:
    """Runs the exact kernels (docs/exact.md) in the block, in every thread of the process. Raises
    BackendUnavailableError where the extension has none."""
    if not hasattr(torch.ops.glm_core, "set_exact"):
        raise BackendUnavailableError(
            f"exact: the C++ extension is older than its sources; {REBUILD}"
        )
    _count_exact(1)
    try:
        yield
    finally:
        _count_exact(-1)


def _count_exact(change: int) -> None:
    global _exact_users
    with _exact_lock:
        _exact_users += change
        torch.ops.glm_core.set_exact(_exact_users > 0)


_trouble = _load()


def probe() -> Probe:
    """Reports the backend usable where the extension is built, fits this torch, and GLM_CORE_ISA is
    unset or names an instruction set that this CPU has."""
    return Probe(not _trouble, _trouble)


def loaded() -> bool:
    """Returns whether the operators are loaded."""
    return not _trouble
