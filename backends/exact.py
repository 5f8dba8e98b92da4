"""Says how far a backend's sums have the order of docs/exact.md."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch


class Exact(NamedTuple):
    """The exact kernels of a backend."""

    switch: Callable[[], AbstractContextManager[None]]
    """opens a block in which kernels sum in that order"""
    dtypes: tuple[torch.dtype, ...]
    lacks: tuple[str, ...] = ()
    """ops without an exact kernel, and settings of a run that sum without one"""
    plans: bool = True
    """whether plans over several processes were shown to keep the order"""
