"""Experts' products and latent attention give the same bits however the threads share them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.model.quantize import Quantization, codes_of

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "activation_bits"), [(4, 32, 8), (4, 128, 16), (8, 0, 8), (8, 0, 16)]
)
def test_an_experts_product_has_the_bits_of_a_product_alone(
    dtype: torch.dtype,
    bits: int,
    group: int,
    activation_bits: int,
    threads: Callable[[int], None],
) -> None:
    """With few rows of each expert, empty ones included, and with one that has many."""
    g = torch.Generator().manual_seed(0)
    how = Quantization(bits=bits, group=group, activation_bits=activation_bits)
    codes, scale = codes_of(torch.randn(5, 77, 256, generator=g), how)
    for counts in ([1, 0, 3, 1, 0], [0, 0, 0, 16, 2], [0, 40, 1, 0, 0]):
        x = torch.randn(sum(counts), 256, generator=g).to(dtype)
        each = [i for i, n in enumerate(counts) for _ in range(n > 0)]
        parts = [part for part in x.split(counts) if len(part)]
        for number in (1, 3):
            threads(number)
            with registry.use("cpu", strict=True):
                together = ops.quantized_grouped_linear(
                    x, codes, scale, torch.tensor(counts), bits, activation_bits
                )
                alone = [
                    ops.quantized_linear(part, codes[i], scale[i], None, bits, activation_bits)
                    for i, part in zip(each, parts, strict=True)
                ]
            assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [20, 7])
def test_threads_share_the_queries_of_a_lone_key_head(
    dtype: torch.dtype, heads: int, threads: Callable[[int], None]
) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, heads, 72, generator=g).to(dtype)
    k = torch.randn(1, 150, 1, 72, generator=g).to(dtype)
    start, end = (torch.full((1, 1), n, dtype=torch.int32) for n in (3, 140))
    seen = []
    for number in (1, 2, 3):
        threads(number)
        with registry.use("cpu", strict=True):
            seen.append(ops.attention(q, k, k[..., :64], start, end, 0.1))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    truth = ops.attention.reference(q, k, k[..., :64], start, end, 0.1)
    torch.testing.assert_close(seen[0], truth, rtol=0.02, atol=0.02)
