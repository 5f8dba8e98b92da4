"""Wrong kernels as data: what each op's samples must reject. One file per family of ops."""

from __future__ import annotations

from glm_core.faults.general import general
from glm_core.faults.mutant import MUTANTS, Mutant
from glm_core.ops import all_ops

__all__ = ["Mutant", "every_mutant"]


def every_mutant() -> list[Mutant]:
    """The mistakes particular to an op, and for every op those that any kernel can make."""
    return [*MUTANTS, *(m for op in all_ops().values() for m in general(op))]
