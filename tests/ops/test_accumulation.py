"""Every op's contract says in which dtype its sums accumulate, gradients included, and the
reference keeps it: over thousands of summands of one sign, a sum kept in 16 bits stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.conformance.oracle import Results, leaf, tensors_by_name
from glm_core.distributed import norm as distributed_norm

N = 3000
"""summands: a sum of ones kept in bfloat16 stops at 256, in float16 at 2048"""
Draw = Callable[..., Tensor]


def linear(draw: Draw, rows: int, d: int, f: int) -> dict[str, Any]:
    return {"x": draw(rows, d), "weight": draw(f, d), "bias": draw(f)}


def norm(draw: Draw, rows: int, d: int, *names: str) -> dict[str, Any]:
    return {"x": draw(rows, d)} | {n: draw(rows, d) if n == "residual" else draw(d) for n in names}


def attention(draw: Draw, length: int, keys: int, heads: int) -> dict[str, Any]:
    whole = torch.full((1, length), keys, dtype=torch.int32)
    kv = {"k": draw(1, keys, 1, 2), "v": draw(1, keys, 1, 2)}
    seen = {"key_start": torch.zeros_like(whole), "key_end": whole, "scale": 0.1}
    return {"q": draw(1, length, heads, 2), **kv, **seen}


def loss(draw: Draw, n: int, d: int, v: int) -> dict[str, Any]:
    labels = torch.zeros(n, dtype=torch.int64)
    return {
        "x": draw(n, d) / d,
        "weight": draw(v, d),
        "labels": labels,
        "token_weight": torch.ones(n),
    }


def quantized(draw: Draw, rows: int, d: int, f: int) -> dict[str, Any]:
    codes = torch.full((f, d), 3, dtype=torch.int8)
    return {"x": draw(rows, d), "weight": codes, "scale": torch.full((f,), 0.25).half()}


def routed(draw: Draw, tokens: int, d: int, experts: int) -> dict[str, Any]:
    x, weight = draw(tokens, d) / d, draw(experts, d).float()
    return {"x": x, "weight": weight, "bias": torch.zeros(experts), "top_k": experts}


def gathered(draw: Draw, tokens: int, d: int, top_k: int) -> dict[str, Any]:
    weights, order = draw(tokens, top_k).float(), torch.arange(tokens * top_k).flip(0)
    return {"rows": draw(tokens * top_k, d), "order": order, "weights": weights}


def grouped(draw: Draw, rows: int, d: int, f: int) -> dict[str, Any]:
    counts = torch.tensor([0, rows - 1, 1])
    return {"rows": draw(rows, d), "weight": draw(3, f, d), "counts": counts}


def quantized_groups(draw: Draw, rows: int, d: int, f: int) -> dict[str, Any]:
    counts, codes = torch.tensor([0, rows]), torch.full((2, f, d), 3, dtype=torch.int8)
    scale = torch.full((2, f), 0.25).half()
    return {"rows": draw(rows, d), "weight": codes, "scale": scale, "counts": counts}


def spread(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 3), "experts": torch.arange(2 * N).reshape(2, N) % 3, "num_experts": 3}


NORMS: dict[Any, tuple[str, ...]] = {
    ops.rms_norm: ("weight",),
    ops.layer_norm: ("weight", "bias"),
    ops.add_rms_norm: ("residual", "weight"),
    ops.add_layer_norm: ("residual", "weight", "bias"),
}
LONG: dict[str, list[Callable[[Draw], dict[str, Any]]]] = {
    "linear": [lambda draw, s=s: linear(draw, *s) for s in ((N, 2, 3), (2, N, 3), (2, 3, N))],
    "quantized_linear": [lambda draw, s=s: quantized(draw, *s) for s in ((2, N, 3), (2, 3, N))],
    "embedding": [lambda draw: {"ids": torch.zeros(N, dtype=torch.int64), "weight": draw(2, 3)}],
    "attention": [lambda draw, s=s: attention(draw, *s) for s in ((2, N, 2), (N, 2, 2), (2, 3, N))],
    "linear_cross_entropy": [
        lambda draw, s=s: loss(draw, *s) for s in ((N, 2, 3), (2, N, 3), (2, 3, N))
    ],
    "global_norm": [lambda draw: {"tensors": [draw(N), draw(3, N)]}],
    "route": [lambda draw, s=s: routed(draw, *s) for s in ((N, 2, 3), (2, N, 3))],
    "permute": [spread],
    "unpermute": [lambda draw, s=s: gathered(draw, *s) for s in ((2, 3, N), (2, N, 3))],
    "quantized_grouped_linear": [
        lambda draw, s=s: quantized_groups(draw, *s) for s in ((2, N, 3), (2, 3, N))
    ],
    "grouped_linear": [
        lambda draw, s=s: grouped(draw, *s) for s in ((N, 2, 3), (2, N, 3), (2, 3, N))
    ],
} | {
    op.name: [lambda draw, s=s, names=names: norm(draw, *s, *names) for s in ((N, 16), (2, N))]
    for op, names in NORMS.items()
}
"""by op that sums: calls in which each of its sums is long"""


def results(op: Any, args: dict[str, Any]) -> Results:
    """Returns the outputs and, for output gradients of one, the gradients."""
    leaves = Results()
    args = {k: leaf(k, v, leaves) if k in op.differentiable else v for k, v in args.items()}
    outputs = tensors_by_name("out", op.reference(**args))
    if leaves:
        floating = [y for y in outputs.values() if y.is_floating_point()]
        torch.autograd.backward(floating, [torch.ones_like(y) for y in floating])
    return {**outputs, **{f"d {k}": x.grad for k, x in leaves.items() if x.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("op", LONG)
def test_the_reference_sums_in_float32(op: str, dtype: torch.dtype) -> None:
    declared = ops.all_ops()[op]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)

    for make in LONG[op]:
        args = make(draw)
        wide = {k: _widened(v) for k, v in args.items()}
        got, exact = results(declared, args), results(declared, wide)
        for name, y in ((k, y) for k, y in exact.items() if y.is_floating_point()):
            scale = y.abs().amax().clamp(min=1.0)
            error = (got[name].double() - y).abs().max() / scale
            assert error <= 16 * torch.finfo(dtype).eps, f"{name} {list(y.shape)}: {error:.1e}"


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: ops.global_norm.reference([x]),
        lambda x: distributed_norm.global_norm([distributed_norm.GradientPart(x, 1)]),
    ],
    ids=["reference", "of ranks"],
)
def test_the_gradient_norm_keeps_small_squares(norm: Callable[[Tensor], Tensor]) -> None:
    """An embedding's gradient has large rows, of frequent tokens, and many small ones."""
    rows = torch.exp(-torch.arange(4096) / 300)[:, None]
    x = torch.randn(4096, 131, generator=torch.Generator().manual_seed(0)) * rows
    assert float(norm(x)) == pytest.approx(float(x.double().norm()), rel=1e-6)  # naively 4e-5


def _widened(x: Any) -> Any:
    if isinstance(x, list):
        return [_widened(v) for v in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("op", ops.all_ops())
def test_the_contract_says_where_sums_accumulate(op: str) -> None:
    doc = " ".join(ops.all_ops()[op].doc.split())
    expected = "Accumulates in float32" if op in LONG else "Accumulates nothing"
    assert expected in doc
