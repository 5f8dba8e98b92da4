"""Every op call of a training step with its arguments and output gradients, to be replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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


def copied(x: Any) -> Any:
    """Tensors copied with their strides: a view of a larger tensor stays a view of one."""
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

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The interceptor: records, runs, and listens for the outputs' gradients."""
        named = {**dict(zip(op.parameters, args, strict=False)), **kwargs}
        call = Call(
            op=op, index=len(self.calls), layer=self.layer, step=self.step,
            args=tree_map(copied, named), output_gradients=[],
        )  # fmt: skip
        self.calls.append(call)
        result = dispatch.run(op, args, kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        if any(isinstance(y, Tensor) and y.requires_grad for y in outputs):
            call.output_gradients.extend([None] * len(outputs))
            for i, y in enumerate(outputs):
                if y.requires_grad:
                    y.register_hook(_listener(call, i))
        return result


def _listener(call: Call, output: int) -> Any:
    def listen(gradient: Tensor) -> None:
        call.output_gradients[output] = copied(gradient)

    return listen


@contextmanager
def capture(model: nn.Module, step: int) -> Iterator[Capture]:
    """Captures every op call of this thread in the block; layers are named after `model.blocks`."""
    record = Capture(step)

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            record.layer = name

        return hook

    handles = []
    for i, block in enumerate(model.get_submodule("blocks").children()):
        handles.append(block.register_forward_pre_hook(enter(str(i))))
        handles.append(block.register_forward_hook(enter("")))
    try:
        with dispatch.intercept(record):
            yield record
    finally:
        for handle in handles:
            handle.remove()
