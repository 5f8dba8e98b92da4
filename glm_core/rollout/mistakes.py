"""What engines that sample do otherwise than the one that trains: each mistake as a Variant, with
its size as an argument.

Shapes: N tokens, T experts of a token, D width, X experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core import dispatch
from glm_core.dispatch import Op
from glm_core.model.glm import GLM
from glm_core.model.quantize import Quantization, convert
from glm_core.rollout.engine import Variant, plain_end, plain_position
from glm_core.rollout.files import Reply


class _LowHead(nn.Module):
    """A head that computes logits in a lower dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight.to(dtype), dtype

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.dtype), self.weight).to(hidden.dtype)


def sharing(model: GLM, head: Tensor | None = None) -> GLM:
    """Returns another model with the same tensors; with `head`, the head is that, not tied."""
    config = (
        dataclasses.replace(model.config, tied_head=False) if head is not None else model.config
    )
    with torch.device("meta"):
        other = GLM(config)
    tensors = dict(model.state_dict())
    if head is not None:
        tensors["head"] = head
    other.load_state_dict(tensors, assign=True)
    return other


def low_head(dtype: torch.dtype = torch.bfloat16) -> Variant:
    """Computes logits in a lower dtype."""

    def make(model: GLM) -> GLM:
        other = sharing(model)
        other.head_codes = _LowHead(model.head_weight.detach(), dtype)
        return other

    return Variant(model=make)


def low_router(dtype: torch.dtype = torch.bfloat16) -> Variant:
    """Computes the router's scores in a lower dtype."""

    def route(op: Op, a: dict[str, Any]) -> Any:
        x, weight = a["x"].to(dtype), a["weight"].to(dtype)
        logits = nn.functional.linear(x, weight).to(a["weight"].dtype)  # [N, X]
        same = torch.eye(len(weight), dtype=logits.dtype, device=logits.device)
        return op.reference(**{**a, "x": logits, "weight": same})

    return _one_op("route", route)


def other_pairing(how: str) -> Variant:
    """Combines a token's experts with the weights of others: `reversed` or `rolled`."""

    def unpermute(op: Op, a: dict[str, Any]) -> Any:
        w = a["weights"]
        return dispatch.run(
            op, (), {**a, "weights": w.flip(-1) if how == "reversed" else w.roll(1, -1)}
        )

    return _one_op("unpermute", unpermute)


def other_order(dtype: torch.dtype = torch.float32) -> Variant:
    """Adds a token's experts from the last to the first, each sum rounded to `dtype`. In float32
    that is an honest order of summation."""

    def unpermute(op: Op, a: dict[str, Any]) -> Any:
        rows, order, weights = a["rows"], a["order"], a["weights"]
        back = torch.zeros_like(order).scatter(0, order, torch.arange(len(order)))
        each = rows.to(dtype).index_select(0, back).unflatten(0, weights.shape)  # [N, T, D]
        total = torch.zeros_like(each[:, 0])
        for j in reversed(range(weights.shape[-1])):
            total = total + each[:, j] * weights[:, j, None].to(dtype)
        return total.to(rows.dtype)

    return _one_op("unpermute", unpermute)


def _one_op(name: str, kernel: Callable[[Op, dict[str, Any]], Any]) -> Variant:
    def replace(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op.name != name:
            return dispatch.run(op, args, kwargs)
        return kernel(op, op.named(args, kwargs))

    return Variant(interceptor=replace)


def turned(chunk: int, by: int) -> Variant:
    """Rotates the prompt's tokens from the second chunk on by `by` places too far; `by` = 0: each
    chunk counts from 0."""

    def position(r: Reply, place: int) -> int:
        if not chunk <= place < len(r.prompt):
            return plain_position(r, place)
        return place + by if by else place % chunk

    return Variant(position=position)


def moved_end(by: int) -> Variant:
    """Ends the mask `by` keys late in the part of a prompt that follows what the prefix cache held:
    -1 hides each token from itself, 1 shows it the next one, where the prompt has one."""

    def key_end(r: Reply, place: int) -> int:
        end = plain_end(r, place)
        behind_hit = r.cached and r.cached <= place and max(end, end + by) <= len(r.prompt)
        return end + by if behind_hit else end

    return Variant(key_end=key_end)


def stale_cache(before: GLM) -> Variant:
    """Decodes on keys and values of the prompts that the weights before the update wrote."""
    return Variant(reads_prompts=before)


def stale_head(before: GLM) -> Variant:
    """Computes logits with the head from before the update."""
    return Variant(model=lambda model: sharing(model, before.head_weight.detach()))


def stale_weights(before: GLM) -> Variant:
    """Computes everything with the weights from before the update."""
    return Variant(model=lambda model: before)


def quantised(bits: int, group: int) -> Variant:
    """Computes with weights of few bits, a scale for each `group` of inputs (0: for each row)."""

    def make(model: GLM) -> GLM:
        other = copy.deepcopy(model)
        for _ in convert(other, Quantization(bits=bits, group=group)):
            pass
        return other

    return Variant(model=make)
