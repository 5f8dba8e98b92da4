"""Declares the product with a weight matrix.

Shapes: D input width, F output width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, product
from glm_core.spec import Cost, Sample, normal


def linear_samples() -> Iterator[Sample]:
    def make(
        id: str,
        rows: tuple[int, ...],
        d: int,
        f: int,
        bias: bool = True,
        strided: bool = False,
        std: float = 1.0,
    ) -> Sample:
        args = {
            "x": normal(*rows, d, std=std, strided=strided),
            "weight": normal(f, d, std=d**-0.5, strided=strided),
        }
        return Sample(
            id, {**args, **({"bias": normal(f, std=0.2)} if bias else {})}, real="4096" in id
        )

    yield make("2x5x96-64", (2, 5), 96, 64)
    yield make("2x5x96-64-nobias", (2, 5), 96, 64, bias=False)
    yield make("1x1-1", (1,), 1, 1)
    yield make("3x33-17-strided", (3,), 33, 17, strided=True)
    yield Sample("3x33-17-gapped", gapped(make("", (3,), 33, 17).args))
    yield make("3x33-17-tiny", (3,), 33, 17, bias=False, std=1e-4)
    yield make("3x33-17-huge", (3,), 33, 17, std=1e3)
    yield make("2x1001-5", (2,), 1001, 5)  # long enough for low-precision partial sums to show
    yield make("0x16-8", (0,), 16, 8)
    for id, rows, d, f in (("129x65-257", 129, 65, 257), ("3x8193-5", 3, 8193, 5)):
        yield Sample(id, make("", (rows,), d, f, strided=True).args, large=True)
    yield make("4x4096-4608", (4,), 4096, 4608)  # QKV of ChatGLM2 / GLM-4


def linear_cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    flops = 2 * x.numel() * weight.shape[0]
    out = x.numel() // max(weight.shape[1], 1) * weight.shape[0] * x.element_size()
    moved = num_bytes(x, weight, bias) + out
    return Cost(flops, moved, 2 * flops, 2 * num_bytes(x, weight) + out)


@op(samples=linear_samples, cost=linear_cost, differentiable=("x", "weight", "bias"))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes y = x weight^T + bias.

    Shapes: x [..., D], weight [F, D], bias [F] -> [..., F]. Rounded to x's dtype. Accumulates in
    float32 at least: y over D, the gradient of x over F, those of weight and bias over rows.
    Source: torch.nn.functional.linear."""
    return product(x, weight, bias)
