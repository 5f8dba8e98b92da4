"""What a mutant is, and how the catalogue grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from glm_core.dispatch import Op

Kernel = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A kernel that is wrong on purpose."""

    name: str
    op: Op
    wrong: str
    """the mistake, in words"""
    kernel: Kernel

    @property
    def id(self) -> str:
        """`rms_norm/eps_outside_root`."""
        return f"{self.op.name}/{self.name}"


MUTANTS: list[Mutant] = []


def mutant(*ops: Op, wrong: str) -> Callable[[Kernel], Kernel]:
    """Registers the decorated kernel as wrong for each of the ops that share its signature."""

    def register(kernel: Kernel) -> Kernel:
        MUTANTS.extend(Mutant(kernel.__name__, op, wrong, kernel) for op in ops)
        return kernel

    return register


def pulled(x: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """x itself, whose gradient passes through `pull`: for mistakes of the backward only."""
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(pull)
    return y
