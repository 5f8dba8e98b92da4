"""The model of npu_fusion_attention, and the registration of all models of `npu_model.py` with
torch_npu's own derivatives (Ascend/op-plugin config/derivatives.yaml)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import npu_grouped_model
import npu_model
import torch
from torch import Tensor

_npu = torch.ops.npu


def _heads(q: Tensor, k: Tensor, v: Tensor, layout: str, num: int) -> list[Tensor]:
    """[B, N, S, D] in float32, kv heads repeated for their query heads."""
    assert layout == "BSND", "only BSND is modelled"
    assert q.shape[2] == num
    assert k.shape == v.shape
    assert q.shape[2] % k.shape[2] == 0
    assert 1 <= q.shape[3] <= 768
    assert 1 <= num <= 256
    groups = num // k.shape[2]
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    return [q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, precise: int) -> Any:
    """Probabilities, maxima and sums: a True in the mask hides. A row that sees nothing is zero
    with inner_precise 2, else the mask is one large addend and it sees everything."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        b, s, t = scores.shape[0], *scores.shape[-2:]
        assert mask.dtype in (torch.bool, torch.uint8)
        assert tuple(mask.shape) in ((b, 1, s, t), (1, 1, s, t), (s, t)), mask.shape
        mask = mask.bool()
        scores = scores.masked_fill(mask, -torch.inf) if precise == 2 else scores - 1e9 * mask
    top = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - top.clamp(min=-3e38))
    total = e.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros(()), e / total), top, total


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    pre: int,
    following: int,
    inner_precise: int,
    *rest: Any,
) -> tuple[Any, ...]:
    """Probabilities are rounded before the product with the values, as flash attention does."""
    dtype = npu_model.one_dtype(query, key, value)
    assert pse is None
    assert padding_mask is None
    assert keep_prob == 1
    assert rest[3] == 0, "only sparse_mode 0 is modelled"
    q, k, v = _heads(query, key, value, input_layout, head_num)
    p, top, total = _probabilities(q, k, atten_mask, scale, inner_precise)
    y = (p.to(dtype).float() @ v).transpose(1, 2).to(dtype).contiguous()
    stats = [t.expand(*t.shape[:-1], 8).contiguous() for t in (top, total)]
    return (y, *stats, query.new_empty(0), 0, 0, 0)


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None,
    scale_value: float,
    inner_precise: int,
    **_: Any,
) -> tuple[Tensor, ...]:
    """dq, dk, dv; pse and sink have none."""
    groups = head_num // key.shape[2]
    q, k, v = _heads(query, key, value, input_layout, head_num)
    p, _top, _total = _probabilities(q, k, atten_mask, scale_value, inner_precise)
    g = dy.transpose(1, 2).float()
    dp = g @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale_value
    dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g

    def merged(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, groups)).sum(2)

    grads = [t.transpose(1, 2).to(query.dtype) for t in (dq, merged(dk), merged(dv))]
    return (*grads, query.new_empty(0), query.new_empty(0))


def _num_positional(name: str) -> int:
    """A derivative has one gradient for each of these: torch counts them since 2.14."""
    return sum(not a.kwarg_only for a in getattr(_npu, name).default._schema.arguments)


Derivative = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]
"""(inputs, outputs, gradients of the outputs) -> gradients of the inputs"""

DERIVATIVES: dict[str, Derivative] = {
    "npu_rms_norm": lambda i, o, g: (*_npu.npu_rms_norm_backward(g[0], *i[:2], o[1]), None),
    "npu_add_layer_norm": lambda i, o, g: (
        *_npu.npu_add_layer_norm_backward(g[0], i[0], i[1], o[2], o[1], i[2], g[3]),
        None,
        None,
    ),
    "npu_gelu": lambda i, o, g: _npu.npu_gelu_backward(g[0], i[0], approximate=i[1]),
    "npu_geglu": lambda i, o, g: (_npu.npu_geglu_grad(g[0], i[0], o[1], *i[1:]), None, None, None),
    "npu_swiglu": lambda i, o, g: (_npu.npu_swiglu_backward(g[0], i[0], i[1]), None),
    "npu_rotary_mul": lambda i, o, g: (
        _npu.npu_rotary_mul_backward(g[0], *i[:4])[0],
        None,
        None,
        None,
        None,
    ),
    "npu_fusion_attention": lambda i, o, g: (
        *_npu.npu_fusion_attention_grad(
            *i[:3],
            g[0],
            *i[3:5],
            atten_mask=i[7],
            softmax_max=o[1],
            softmax_sum=o[2],
            attention_in=o[0],
            scale_value=i[8],
            inner_precise=i[12],
        )[:3],
        *[None] * (_num_positional("npu_fusion_attention") - 3),
    ),
}


_kept: list[torch.library.Library] = []
_SAVED = object()
"""stands for a tensor kept by save_for_backward"""


def _register_derivative(name: str, derivative: Derivative) -> None:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        values = [*inputs, *outputs]
        ctx.save_for_backward(*(t for t in values if isinstance(t, Tensor)))
        ctx.values = [_SAVED if isinstance(t, Tensor) else t for t in values]
        ctx.num_inputs = len(inputs)

    def with_keywords(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        setup(ctx, (*inputs, *keyword_only_inputs.values()), output)

    def backward(ctx: Any, *grads: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if v is _SAVED else v for v in ctx.values]
        return derivative(values[: ctx.num_inputs], values[ctx.num_inputs :], grads)

    keywords = any(a.kwarg_only for a in getattr(_npu, name).default._schema.arguments)
    torch.library.register_autograd(
        f"npu::{name}", backward, setup_context=with_keywords if keywords else setup
    )


def _filled(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch leaves arguments out that have their default value; the models want them all."""
    arguments = operator._schema.arguments
    plain = [a for a in arguments if not a.kwarg_only]

    def call(*args: Any, **kwargs: Any) -> Any:
        rest = [kwargs.pop(a.name, a.default_value) for a in plain[len(args) :]]
        named = {a.name: kwargs.get(a.name, a.default_value) for a in arguments if a.kwarg_only}
        return function(*args, *rest, **named)

    return call


def register() -> None:
    """Defines every operator, once in a process."""
    library = torch.library.Library("npu", "DEF")
    _kept.append(library)
    for schema in npu_model.schemas():
        library.define(schema)
        name, _, overload = schema.partition("(")[0].partition(".")
        operator = getattr(getattr(_npu, name), overload or "default")
        modules = (npu_model, npu_grouped_model, sys.modules[__name__])
        module = next(m for m in modules if hasattr(m, name))
        kernel = _filled(operator, getattr(module, name))
        library.impl(f"{name}.{overload}" if overload else name, kernel, "CPU")
    for name, derivative in DERIVATIVES.items():
        _register_derivative(name, derivative)
