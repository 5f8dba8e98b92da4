"""Captures every op call of a training step with its arguments and output gradients, so that it can
be replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from glm_core import dispatch
from glm_core.dispatch import Op


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Call:
    """One op call as it happened."""

    op: Op
    index: int
    """which call of the step, from 0, over all ops"""
    layer: str
    """the block it belongs to, "" outside of blocks"""
    step: int
    args: dict[str, Any]
    """by parameter name, copied before the call"""
    output_gradients: list[Tensor | None]
    """one per output, filled in by the backward pass; empty where nothing is differentiated"""

    def tensors(self) -> list[Tensor]:
        """Returns the tensors among the arguments, those in lists too."""
        return [x for x in tree_leaves(self.args) if isinstance(x, Tensor)]

    def where(self, direction: str) -> str:
        """Returns the call in words: `op geglu forward in layer 0`."""
        return f"op {self.op.name} {direction}" + (f" in layer {self.layer}" if self.layer else "")

    def place(self, direction: str) -> dict[str, Any]:
        """Returns which call it is, and the dtype and shape of its first floating-point tensor."""
        first = next((x for x in self.tensors() if x.is_floating_point()), torch.empty(0))
        return {
            "op": self.op.name,
            "direction": direction,
            "layer": self.layer,
            "step": self.step,
            "call": self.index,
            "dtype": str(first.dtype).removeprefix("torch."),
            "shape": list(first.shape),
        }


def copied(x: Any) -> Any:
    """Copies a tensor with its strides: a view of a larger tensor stays a view. Anything else is
    returned unchanged."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    if x.is_contiguous() or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    flat = torch.as_strided(x, (span,), (1,), x.storage_offset()).clone()
    return torch.as_strided(flat, x.shape, x.stride())


class Capture:
    """Collects the calls of one step. `calls` is complete after the backward pass."""

    def __init__(self, step: int) -> None:
        self.step, self.calls, self.layer = step, list[Call](), ""

    def enter(self, layer: str) -> None:
        """Assigns the calls that follow to this block."""
        self.layer = layer

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The interceptor: records the call, runs it, and hooks the outputs' gradients."""
        named = op.named(args, kwargs)
        call = Call(
            op=op,
            index=len(self.calls),
            layer=self.layer,
            step=self.step,
            args=tree_map(copied, named),
            output_gradients=[],
        )
        self.calls.append(call)
        result = dispatch.run(op, args, kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        if not any(isinstance(y, Tensor) and y.requires_grad for y in outputs):
            return result
        call.output_gradients.extend([None] * len(outputs))
        # aliases, because an output that the op itself uses further has a gradient from inside too
        aliases = tuple(y.view_as(y) for y in outputs)
        for i, y in enumerate(aliases):
            if y.requires_grad:
                y.register_hook(_gradient_hook(call, i))
        return aliases if isinstance(result, tuple) else aliases[0]


def _gradient_hook(call: Call, output: int) -> Any:
    def keep(gradient: Tensor) -> None:
        call.output_gradients[output] = copied(gradient)

    return keep


@contextmanager
def layers(model: nn.Module, enter: Callable[[str], None]) -> Iterator[None]:
    """Calls `enter` with the number of the block of `model.blocks` that runs, and "" after it."""
    handles = []
    for i, block in enumerate(model.get_submodule("blocks").children()):
        handles.append(block.register_forward_pre_hook(lambda *_, i=i: enter(str(i))))
        handles.append(block.register_forward_hook(lambda *_: enter("")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, step: int, into: Capture | None = None) -> Iterator[Capture]:
    """Captures every op call that this thread makes inside the block, in `into` or a new Capture;
    layers are the numbers of `model.blocks`."""
    captured = into or Capture(step)
    with layers(model, captured.enter), dispatch.intercept(captured):
        yield captured
