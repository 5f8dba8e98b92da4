"""Tests the product of many rows with codes without a device: which calls it takes, and the
instructions that make weights of codes, executed here one by one. Its numbers are judged in
Triton's interpreter (test_triton.py), which does not know these instructions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glm_core import ops
from glm_core.backends.cuda import quantized
from glm_core.backends.registry import probe

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
FMA = re.compile(r"fma\.rn\.(b?f16)x2")


def halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the two halves [N, 2] of 32-bit words, the lower one first."""
    return words.to(torch.int32)[:, None].view(torch.int16).view(dtype)


def executed(text: str, given: dict[str, Tensor]) -> Tensor:
    """Runs lines of PTX on 32-bit words [N], and returns the pair that the last one takes apart."""
    words, size = dict(given), len(next(iter(given.values())))

    def value(name: str) -> Tensor:
        return torch.full((size,), int(name, 0)) if name[0].isdigit() else words[name]

    for line in re.findall(r"[a-z][\w.]+ [^;]+(?=;)", text.split(";", 1)[1]):
        op, _, rest = line.partition(" ")
        target, *names = re.findall(r"\$?\w+", rest)
        if op == "mov.b32" and "{" in rest:
            return words[names[-1]]
        x = [value(n) for n in names]
        if op == "mov.b32":
            words[target] = x[0]
        elif op == "shr.u32":
            words[target] = x[0] >> int(names[1])
        elif op == "prmt.b32":
            bytes_ = [(w >> 8 * i) & 0xFF for w in x[:2] for i in range(4)]
            chosen = [bytes_[int(names[2], 0) >> 4 * i & 7] for i in range(4)]
            words[target] = sum(
                (b << 8 * i for i, b in enumerate(chosen)), torch.zeros(size).long()
            )
        elif op == "lop3.b32":
            assert names[3] == "0x6a"  # (a & b) ^ c
            words[target] = (x[0] & x[1]) ^ x[2]
        else:
            dtype = HALVES[FMA.fullmatch(op)[1]]  # type: ignore[index]  # else a new instruction
            a, b, c = (halves(w, dtype).double() for w in x)
            pair = (a * b + c).to(dtype).view(torch.int16).view(torch.int32)
            words[target] = pair[:, 0].long() & 0xFFFFFFFF
    raise AssertionError("no line takes the pair apart")


@pytest.mark.parametrize("name", HALVES)
def test_instructions_make_weights_of_every_code(name: str) -> None:
    product: Any = pytest.importorskip("glm_core.backends.cuda.quantized_product")
    text = (product.FLOAT16_PAIR if name == "f16" else product.BFLOAT16_PAIR).value
    dtype, codes = HALVES[name], torch.arange(256).repeat(64)
    scale = (torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1).half()
    scale = scale.float().repeat_interleave(256)
    near = scale.to(dtype)

    def twice(x: Tensor) -> Tensor:
        return (x.view(torch.int16).long() & 0xFFFF) * 0x10001

    given = {"$2": codes, "$3": twice(near), "$4": twice((scale - near.float()).to(dtype))}
    found = halves(executed(text, given), dtype).float()
    even, odd = codes.to(torch.int8) >> 4, (codes << 4).to(torch.int8) >> 4
    right = (torch.stack((even, odd), 1) * scale[:, None].double()).to(dtype).float()
    assert torch.equal(found, right) or name == "bf16"
    assert ((found - right).abs() <= torch.finfo(dtype).eps * right.abs()).all()
    assert (found == right).double().mean() > 0.99  # twice rounded, almost always as if once


def test_takes_many_rows_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "HAS_TRITON", True)
    with FakeTensorMode():
        x, scale = torch.empty(65, 256).half(), torch.empty(8, 2)
        assert quantized.in_one_kernel(x, scale)
        assert quantized.in_one_kernel(x[None], torch.empty(8))
        assert not quantized.in_one_kernel(x[:64], scale)
        assert not quantized.in_one_kernel(x.float(), scale)
        assert not quantized.in_one_kernel(x[:, :48], torch.empty(8))
        codes = torch.empty(8, 128, dtype=torch.int8)
        y = torch.ops.glm_core_gpu.quantized_product(x[None], codes, scale, None, 4)
    assert y.shape == (1, 65, 8)


@pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)
def test_a_call_and_its_gradient_reach_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is replaced by the reference; what lies around it is tested."""
    monkeypatch.setattr(quantized, "HAS_TRITON", True)
    library, calls = torch.library.Library("glm_core_gpu", "IMPL"), []

    def kernel(*args: Any) -> Tensor:
        calls.append(args)
        return ops.quantized_linear.reference(*args)

    library.impl("quantized_product", kernel, "CPU")
    try:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(65, 64, generator=g).bfloat16().requires_grad_()
        codes = torch.randint(-128, 128, (8, 32), generator=g).to(torch.int8)
        scale, dy = torch.rand(8, generator=g).half(), torch.randn(65, 8, generator=g).bfloat16()
        quantized.quantized_linear(x, codes, scale, None, 4).backward(dy)
    finally:
        library._destroy()
    assert len(calls) == 1
    wide = x.detach().double().requires_grad_()
    exact = ops.quantized_linear.reference(wide, codes, scale.double(), None, 4)
    (right,) = torch.autograd.grad(exact, wide, dy.double())
    assert x.grad is not None
    assert (x.grad - right).abs().max() <= 2**-6 * right.abs().max()


@pytest.mark.parametrize(
    ("chip", "takes"), [("sm_75", False), ("sm_80", True), ("sm_120", True), ("gfx906", False)]
)
def test_chips_with_tensor_cores(monkeypatch: pytest.MonkeyPatch, chip: str, takes: bool) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(quantized.probe, "architecture", lambda index: chip)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert quantized.suits.__wrapped__(0) is takes
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert not quantized.suits.__wrapped__(0)
