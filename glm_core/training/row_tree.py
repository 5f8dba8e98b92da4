"""Sums a step's sequences up by one tree, whatever micro-batches they come in (docs/exact.md)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from glm_core.training.optimizer import assign_gradient


class RowTree:
    """Adds up the gradients and losses of single sequences: neighbours first, then pairs of
    neighbours, and so on. What is not a whole pair at the end is added from the right."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._held: list[tuple[int, list[Tensor | None]]] = []
        """subtrees that wait for their right neighbour: number of sequences, sums"""

    def add(self, loss: Tensor) -> None:
        """Takes over the gradients that lie in `.grad`, of one sequence, and its loss."""
        self._held.append((1, [*(p.grad for p in self._trained), loss]))
        for p in self._trained:
            p.grad = None
        while len(self._held) > 1 and self._held[-1][0] == self._held[-2][0]:
            self._join()

    def finish(self) -> Tensor:
        """Puts the sums into `.grad` and returns the loss. The tree is empty afterwards."""
        while len(self._held) > 1:
            self._join()
        ((_, (*grads, loss)),) = self._held
        self._held = []
        for p, grad in zip(self._trained, grads, strict=True):
            assign_gradient(p, grad)
        assert loss is not None
        return loss

    def _join(self) -> None:
        right, left = self._held.pop(), self._held.pop()
        self._held.append((left[0] + right[0], _sums(left[1], right[1])))


def _sums(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the sums, written over the left ones. None: a parameter that was not used."""
    pairs = zip(left, right, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]
