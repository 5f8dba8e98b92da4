"""Exact arithmetic: a token's logits have the same bits in training, in prompts read whole or in
chunks, and in decoding, alone and in company, on every instruction set (docs/exact.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm_core.backends import registry
from glm_core.backends.cpu import isas, select_isa
from glm_core.conformance.decode import LENGTH, PRESETS, V, built
from glm_core.errors import ConfigError, UnsupportedOpError
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization
from glm_core.model.runner import DecodeRow, Runner

DTYPES = (torch.float32, torch.bfloat16)
DENSE = [name for name in PRESETS if not preset(name).num_experts]
CODES = (Quantization(bits=4, group=32, activation_bits=8), Quantization(bits=8))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with registry.use("cpu", exact=True):
        yield


def sequences(lengths: Sequence[int]) -> list[Prompt]:
    """Returns sequences of these lengths, every second one with a part A of two tokens."""
    tokens = [[(7 * b + 3 * i) % V for i in range(n)] for b, n in enumerate(lengths)]
    return [Prompt(tuple(t), sep=2, mask=1) if b % 2 else causal(t) for b, t in enumerate(tokens)]


def trained(model: GLM, rows: Sequence[Prompt]) -> list[Tensor]:
    """Returns the logits [L, V] of each sequence by one forward pass that records gradients, padded
    on the right."""
    length = max(len(p.tokens) for p in rows)
    tokens = torch.tensor([[*p.tokens, *[0] * (length - len(p.tokens))] for p in rows])
    positions = torch.tensor([[p.position(i) for i in range(length)] for p in rows])
    ends = torch.tensor([[min(p.key_end(i), len(p.tokens)) for i in range(length)] for p in rows])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    starts = torch.zeros(ends.shape, dtype=torch.int32)
    logits = model.logits(tokens, positions.transpose(1, 2), starts, ends.int())
    assert logits.requires_grad
    return [logits[b, : len(p.tokens)].detach().float() for b, p in enumerate(rows)]


def generated(model: GLM, rows: Sequence[Prompt], read: int, chunk: int) -> list[Tensor]:
    """Returns the logits of each sequence from the token before `read` on: the first `read` tokens
    are a prompt read in chunks, the others are decoded together."""
    heads = [Prompt(p.tokens[:read], p.sep, p.mask) for p in rows]
    runner, last = Runner(model, len(rows), chunk=chunk), min(len(p.tokens) for p in rows)
    logits = [runner.prefill(0, heads)]
    for at in range(read, last):
        logits.append(runner.decode([DecodeRow(p.tokens[at], p, at) for p in rows]))
    return list(torch.stack(logits, 1))


def verified(model: GLM, prompt: Prompt, read: int) -> Tensor:
    """Returns the logits of one sequence from the token before `read` on: the tokens after a prompt
    of `read` are checked in one call, as drafts are."""
    runner = Runner(model, 1)
    first = runner.prefill(0, [Prompt(prompt.tokens[:read], prompt.sep, prompt.mask)])
    drafts = [DecodeRow(t, prompt, at) for at, t in enumerate(prompt.tokens) if at >= read]
    return torch.cat((first, runner.verify(0, drafts)))


def assert_exact(model: GLM, rows: Sequence[Prompt], read: int, chunk: int) -> None:
    together = trained(model, rows)
    for row, prompt in enumerate(rows):
        assert torch.equal(trained(model, [prompt])[0], together[row]), "training, alone"
    for row, logits in enumerate(generated(model, rows, read, chunk)):
        expected = together[row][read - 1 : read - 1 + len(logits)]
        assert torch.equal(logits, expected), f"row {row}: prefill and decoding"
    assert torch.equal(verified(model, rows[0], read), together[0][read - 1 :]), "drafts"


@settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(DENSE),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(7, LENGTH - 1), min_size=1, max_size=10),
    read=st.integers(2, 6),
    chunk=st.integers(1, 7),
)
def test_situations_of_dense_models(
    name: str, dtype: torch.dtype, lengths: list[int], read: int, chunk: int
) -> None:
    assert_exact(built(name, dtype), sequences(lengths), read, chunk)


SMALL = {"num_layers": 2, "hidden": 64, "vocab": V, "max_length": LENGTH, "num_mtp_layers": 0}
SPARSE = {
    "grouped": preset("tiny-moe", **SMALL),
    "latent": preset(
        "glm-4.7-flash",
        **SMALL,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        kv_latent=32,
        q_latent=48,
        rope_head_dim=8,
        value_head_dim=20,
        ffn=96,
        num_experts=8,
        expert_ffn=32,
    ),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(name: str, dtype: torch.dtype) -> None:
    model = GLM(SPARSE[name]).init_weights(1).to(dtype)
    assert_exact(model, sequences([40, 9, 23]), 6, 4)


@pytest.mark.parametrize("how", CODES, ids=lambda h: f"int{h.bits}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes(dtype: torch.dtype, how: Quantization) -> None:
    assert_exact(built("glm-4-9b", dtype, how), sequences([40, 9, 23]), 6, 4)


@pytest.mark.parametrize(
    ("dtype", "how"),
    # rounded to bfloat16, results of codes are the same in most orders
    [*((dtype, None) for dtype in DTYPES), *((torch.float32, how) for how in CODES)],
    ids=lambda x: f"int{x.bits}" if isinstance(x, Quantization) else str(x),
)
def test_instruction_sets_and_threads(dtype: torch.dtype, how: Quantization | None) -> None:
    model, rows = built("glm-4-0414-9b", dtype, how), sequences([11, 7])
    found, threads = {}, torch.get_num_threads()
    try:
        for isa in isas():
            select_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                found[isa, count] = [*trained(model, rows), *generated(model, rows, 3, 2)]
    finally:
        select_isa(isas()[-1])
        torch.set_num_threads(threads)
    first = found.pop((isas()[0], 1))
    for key, logits in found.items():
        assert all(torch.equal(a, b) for a, b in zip(first, logits, strict=True)), key


def test_the_fast_kernels_differ() -> None:
    """Otherwise nothing above could fail."""
    model, rows = built("glm-4-9b"), sequences([40])
    exact_logits = trained(model, rows)[0]
    torch.ops.glm_core.set_exact(False)
    try:
        fast, decoded = trained(model, rows)[0], generated(model, rows, 6, 4)[0]
    finally:
        torch.ops.glm_core.set_exact(True)
    assert not torch.equal(fast[5:], decoded)
    assert not torch.equal(fast, exact_logits)


def test_refused_by_name() -> None:
    with (
        pytest.raises(ConfigError, match="exact: backend reference"),
        registry.use("reference", exact=True),
    ):
        pass
    with pytest.raises(UnsupportedOpError, match="float16; drop exact"):
        trained(built("glm-4-9b").half(), sequences([4]))
