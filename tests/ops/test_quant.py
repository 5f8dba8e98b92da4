"""Weights become codes and weights again by GLM-130B's rule and packing, also in groups and for
rows of zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_core.errors import ShapeError
from glm_core.ops import quant
from glm_core.ops.quant import dequantize, pack, quantize, round_activations, unpack


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64]),
    size=st.sampled_from([1e-9, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_a_weight_moves_by_half_a_step_at_most(
    rows: int, groups: int, bits: int, group: int, size: float, seed: int
) -> None:
    width = groups * (group or 32)
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = quantize(w, bits, group)
    assert codes.dtype == torch.int8
    assert codes.shape == (rows, width * bits // 8)
    assert scale.shape == ((rows, width // group) if group else (rows,))
    back = dequantize(codes, scale, bits, torch.float32)
    step = scale.float().reshape(rows, -1).repeat_interleave(group or width, 1)
    # float16 rounds the scale by 2^-11, or by a step of its subnormals: the largest codes lose that
    top = 2 ** (bits - 1) - 1
    limit = step / 2 + w.abs() * 2.0**-11 + top * 2.0**-25
    assert bool(((back - w).abs() <= limit * 1.0001).all())
    assert torch.equal(dequantize(*quantize(back, bits, group), bits, torch.float32), back) or (
        size < 1e-2
    )


def test_row_of_zeros_is_zeros_not_nan() -> None:
    w = torch.randn(3, 64)
    w[1] = 0
    for group in (0, 32):
        codes, scale = quantize(w, 4, group)
        assert not codes[1].any()
        assert not dequantize(codes, scale, 4, torch.bfloat16)[1].any()


def test_a_large_matrix_is_quantised_in_parts_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(w, 4, 32)
    monkeypatch.setattr(quant, "WORKING_SET", 3 * 64)
    parts = quantize(w, 4, 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_packing_is_that_of_glm_130b() -> None:
    codes = torch.tensor([[1, -1, -8, 7]], dtype=torch.int8)
    assert pack(codes).view(torch.uint8).tolist() == [[0x1F, 0x87]]
    every = torch.arange(-128, 128).to(torch.int8)[None]
    assert torch.equal(pack(unpack(every, 4)), every)


def test_row_wise_rule_by_hand() -> None:
    # steps 1/127 and, of 4 bits, 1: halves go to even codes
    codes, scale = quantize(torch.tensor([[7.0, 0.5, 1.5, -2.5]]), 4)
    assert scale.tolist() == [1.0]
    assert unpack(codes, 4).tolist() == [[7, 0, 2, -2]]
    codes, scale = quantize(torch.tensor([[-127.0, 0.5, 1.5, -126.6]]), 8)
    assert codes.tolist() == [[-127, 0, 2, -127]]


@pytest.mark.parametrize(
    ("weight", "bits", "group", "words"),
    [
        (torch.ones(2, 64), 3, 0, "bits must be 8 or 4; received 3"),
        (torch.ones(2, 33), 4, 0, "even input width; received 33"),
        (torch.ones(2, 96), 4, 64, "group=64 must be a multiple of 32 that divides"),
        (torch.ones(2, 64), 8, 16, "group=16 must be a multiple of 32"),
        (torch.full((2, 64), torch.nan), 8, 0, "not finite"),
        (torch.full((2, 64), 1e9), 4, 0, "not finite"),
    ],
)
def test_what_cannot_be_quantised_says_why(
    weight: torch.Tensor, bits: int, group: int, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        quantize(weight, bits, group)


def test_activation_blocks_have_steps_of_their_own() -> None:
    x = torch.cat((torch.linspace(-1, 1, 32), torch.zeros(32), torch.linspace(-100, 50, 7)))
    error = (round_activations(x) - x).abs()
    assert error[:32].max() <= 0.5001 / 127
    assert not error[32:64].any()
    assert error[64:].max() <= 50.01 / 127
    assert error[64:].max() > 1 / 127
