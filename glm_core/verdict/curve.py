"""Follows the loss curve of a program that knows nothing of it, and makes control runs of it: runs
whose weights are moved by a unit in the last place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from glm_core.verdict import oracle

SAMPLED = 1 << 16
"""a sketch looks at so many evenly spaced elements of a tensor at most"""


class Curve:
    """The loss of each optimizer step so far: what `backward` was called on, summed over the step.

    control: 0, or the seed of a control run. unit: a control run moves the weights after its first
    step by half this share of themselves: a unit in the last place of the dtype that the program
    multiplies in. After each later step it moves float32 and float64 weights by a unit of their
    own. Nothing is hooked to modules, so that a compiler sees the program as it is."""

    def __init__(self, control: int = 0, unit: float = 0.0) -> None:
        self.control, self.unit = control, unit
        self.loss: list[float] = []
        self.weights: list[float] = []
        """sketch of the optimizer's weights before its first step"""
        self.gradients: list[float] = []
        """sketch of their gradients then"""
        self.sum: Tensor | None = None

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Returns a context in which the program's losses are seen."""
        plain = torch.autograd.backward

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._add(tensors)
            plain(tensors, *args, **kwargs)

        torch.autograd.backward = backward  # Tensor.backward looks it up there
        try:
            yield
        finally:
            torch.autograd.backward = plain

    def _add(self, tensors: Any) -> None:
        scalars = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.numel() == 1]
        with oracle.alone():
            for t in scalars:
                value = t.detach().double().reshape(())
                self.sum = value if self.sum is None else self.sum + value.to(self.sum.device)

    def begin_step(self, optimizer: Optimizer) -> None:
        """Sketches what the program begins with."""
        if self.weights:
            return
        weights = parameters(optimizer)
        with oracle.alone():
            self.weights = sketch(weights)
            self.gradients = sketch([w.grad for w in weights if w.grad is not None])

    def end_step(self, optimizer: Optimizer | None) -> None:
        """Closes a step; moves the weights of a control run."""
        self.loss.append(float(self.sum) if self.sum is not None else float("nan"))
        self.sum = None
        if self.control and optimizer is not None:
            number = len(self.loss)
            unit = self.unit if number == 1 else 0.0
            with oracle.alone():
                move(parameters(optimizer), self.control + 1000 * number, unit)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; a loss that is not finite is null."""
        loss = [x if abs(x) < float("inf") else None for x in self.loss]
        return {"loss": loss, "weights": self.weights, "gradients": self.gradients}


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Returns the weights of an optimizer, in order."""
    return [w for group in optimizer.param_groups for w in group["params"]]


def sketch(tensors: list[Tensor]) -> list[float]:
    """Returns three numbers that stay as they are where the tensors differ by rounding, and change
    by about 1 where they are others."""
    total, square = torch.zeros(3, dtype=torch.float64, device="cpu"), 0.0
    for i, t in enumerate(map(_own_part, tensors)):
        if t.is_meta or t.is_complex() or t.layout != torch.strided or not t.numel():
            continue
        flat = t.detach().reshape(-1)
        x = flat[:: max(1, flat.numel() // SAMPLED)].cpu().double().nan_to_num()
        at = torch.arange(1, len(x) + 1, dtype=torch.float64, device="cpu") + 0.618 * i
        waves = [torch.cos(at * at * frequency) for frequency in (0.1234, 0.2718, 0.5772)]
        total += torch.stack([x @ wave for wave in waves])
        square += float(x @ x)
    return [float(v) for v in total / max(square, 1e-300) ** 0.5]


def _own_part(x: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor that is spread over ranks; any other as it is."""
    own: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return own


def move(weights: list[Tensor], seed: int, unit: float) -> None:
    """Moves every weight by -1, 0 or 1 times half a `unit` of itself, as much as a rounding, but at
    least by one unit in the last place of its own dtype. Without `unit`, weights below float32
    stay: their own unit is more than an update."""
    for i, weight in enumerate(map(_own_part, weights)):
        generator = torch.Generator("cpu").manual_seed(seed + 1_000_003 * i)
        if not weight.is_floating_point() or weight.is_meta or weight.layout != torch.strided:
            continue
        own = torch.finfo(weight.dtype).eps
        if not unit and own > torch.finfo(torch.float32).eps:
            continue
        steps = torch.randint(-1, 2, weight.shape, generator=generator, device="cpu")
        factor = 1 + max(unit / 2, own) * steps.to(weight.device, torch.float64)
        weight.data.copy_((weight.data.double() * factor).to(weight.dtype))
