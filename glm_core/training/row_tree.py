"""Sums a step's sequences up by one tree, however they are cut into micro-batches and spread over
processes, and the norm over them (docs/exact.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from glm_core.training.optimizer import assign_gradient

Summands = list[Tensor | None]
"""None: a parameter that was not used"""


class Tree:
    """Adds up lists of tensors, element by element: neighbours first, then pairs of neighbours, and
    so on. What is not a whole pair at the end is added from the right."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Summands]] = []
        """subtrees that wait for their right neighbour: number of leaves, sums"""

    def add(self, leaf: Summands, leaves: int = 1) -> None:
        """Takes the next leaf over, or the sum of the next two: its tensors may be overwritten."""
        self._held.append((leaves, leaf))
        while len(self._held) > 1 and self._held[-1][0] == self._held[-2][0]:
            self._join()

    def finish(self) -> Summands:
        """Returns the sums. The tree is empty afterwards."""
        while len(self._held) > 1:
            self._join()
        return self._held.pop()[1]

    def _join(self) -> None:
        right, left = self._held.pop(), self._held.pop()
        self._held.append((left[0] + right[0], _sums(left[1], right[1])))


def _sums(left: Summands, right: Summands) -> Summands:
    """Returns the sums, written over the left ones."""
    pairs = zip(left, right, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]


class RowTree:
    """Adds up the gradients of single sequences by a tree."""

    def __init__(self, model: nn.Module, pairs: bool = True) -> None:
        """pairs: a first neighbour's gradients stay in `.grad`, where torch adds the second one's
        to them. A gradient is then added while it is in the cache, and its memory is used again."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._tree = Tree()
        self._together = 2 if pairs else 1
        self._waiting = 0
        """sequences whose sum lies in `.grad`"""

    def add(self) -> None:
        """Counts a sequence, whose gradients were added to `.grad`."""
        self._waiting += 1
        if self._waiting == self._together:
            self._take()

    def _take(self) -> None:
        self._tree.add([p.grad for p in self._trained], self._waiting)
        self._waiting = 0
        for p in self._trained:
            p.grad = None

    def finish(self) -> None:
        """Puts the sums into `.grad`. The tree is empty afterwards."""
        if self._waiting:
            self._take()
        for p, grad in zip(self._trained, self._tree.finish(), strict=True):
            assign_gradient(p, grad)


def tree_sum(leaves: Iterable[Tensor]) -> Tensor:
    """Returns the sum of the leaves by a tree. They are written over."""
    tree = Tree()
    for leaf in leaves:
        tree.add([leaf])
    [total] = tree.finish()
    assert total is not None
    return total


def norm_of_all(norms: Iterable[Tensor]) -> Tensor:
    """Returns the global norm, given that of each parameter's gradient. The sum of squares is
    rounded once, so that it has no order; zeros do not change it."""
    return torch.tensor(math.sqrt(math.fsum(float(norm) ** 2 for norm in norms)))
