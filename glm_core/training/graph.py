"""Records the forward and backward of a micro-batch as a graph of the device, and replays it: one
launch instead of one for every kernel, so that a small model no longer waits for Python. No GPU has
replayed one yet: tests record and replay on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glm_core.backends.graphs import Graphs
from glm_core.errors import ConfigError


class Recorded(NamedTuple):
    """A recording for one shape of micro-batches."""

    fed: tuple[Tensor, ...]
    """what the recording reads; filled before each replay"""
    loss: Tensor
    replay: Callable[[], None]


class RecordedLoss:
    """Adds a micro-batch's gradients to `.grad`, as `loss(*inputs).backward()` does, by replaying a
    recording. The first micro-batch of a shape runs op by op and is then recorded.

    A recording knows addresses. So every `.grad` keeps its memory for the whole run; where a step
    has begun with `.grad` set to None, the memory is cleared and given back."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], graphs: Graphs) -> None:
        self._loss, self._graphs = loss, graphs
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._recorded: dict[tuple[torch.Size, ...], Recorded] = {}

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """inputs: of the loss, on the device. Returns the loss, a float32 scalar. Raises
        ConfigError where the work cannot be recorded."""
        self._give_gradients_back()
        shapes = tuple(x.shape for x in inputs)
        recorded = self._recorded.get(shapes)
        if recorded is None:
            return self._first(shapes, inputs)
        for kept, x in zip(recorded.fed, inputs, strict=True):
            kept.copy_(x)
        recorded.replay()
        return recorded.loss.clone()

    def _first(self, shapes: tuple[torch.Size, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        fed = tuple(x.clone() for x in inputs)

        def work() -> Tensor:
            loss = self._loss(*fed)
            loss.backward()
            return loss.detach()

        loss = self._graphs.warm_up(work)
        try:
            self._recorded[shapes] = Recorded(fed, *self._graphs.record(work))
        except RuntimeError as error:
            raise ConfigError(
                f"train.graph=True: the step cannot be recorded: {str(error).splitlines()[0]}; "
                "leave graph out"
            ) from error
        return loss

    def _give_gradients_back(self) -> None:
        if not self._gradients:
            self._gradients = [_like_gradient(p) for p in self._parameters]
        gone = [
            (p, grad)
            for p, grad in zip(self._parameters, self._gradients, strict=True)
            if p.grad is not grad
        ]
        if gone:
            torch._foreach_zero_([grad for _, grad in gone])
        for p, grad in gone:
            p.grad = grad


def _like_gradient(p: Tensor) -> Tensor:
    """Returns memory for a parameter's gradient, in the dtype that it is summed in."""
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    return torch.zeros_like(p, dtype=dtype)
