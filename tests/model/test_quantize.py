"""Quantised models: what is replaced, what stays, and how much memory they take."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from glm_core.backends.registry import use
from glm_core.config import ModelConfig
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.quantize import (
    Quantization,
    QuantizedLinear,
    build_quantized,
    convert,
    device_memory,
    model_bytes,
    quantize_head,
)
from glm_core.model.runner import Runner
from glm_core.ops import quant

CONFIG = ModelConfig(num_layers=2, hidden=64, num_heads=2, ffn=96, vocab=128, max_length=32)
GIB = 1 << 30


def inputs() -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(20).reshape(2, 10)
    rows = torch.arange(10).expand(2, 10)
    return tokens, torch.stack((rows, rows), 1), torch.zeros_like(rows).int(), (rows + 1).int()


@pytest.mark.parametrize(
    ("how", "most"),
    [
        (Quantization(bits=8), 0.01),
        (Quantization(bits=4), 0.2),
        (Quantization(bits=4, group=32), 0.12),
        (Quantization(bits=8, activation_bits=8), 0.01),
    ],
)
def test_logits_move_by_what_the_codes_allow(how: Quantization, most: float) -> None:
    model = GLM(CONFIG).init_weights(0)
    with use("reference"), torch.no_grad():
        before = model.logits(*inputs())
        layers = list(convert(model, how))
        after = model.logits(*inputs())
    assert len(layers) == 8
    assert all(0 < x.error < most for x in layers)
    assert all(x.bytes_after < x.bytes_before * how.bits / 32 * 1.3 for x in layers)
    change = (after - before).norm() / before.norm()
    assert 1e-6 < change < 2 * most


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_head_makes_logits_and_nothing_else(tied: bool) -> None:
    model = GLM(dataclasses.replace(CONFIG, tied_head=tied)).init_weights(0)
    tokens, positions, start, end = inputs()
    weight = torch.ones_like(tokens).float()
    told = (tokens, positions, start, end, tokens, weight)
    with use("reference"), torch.no_grad():
        before, loss = model.logits(*inputs()), model.loss(*told)
        change = quantize_head(model, 8)
        after = model.logits(*inputs())
        assert torch.equal(model.loss(*told), loss)
        runner = Runner(model, 1)
        read = runner.prefill(0, [causal([3, 5, 7])])
        row = model.logits(
            tokens[:1, :3] * 0 + torch.tensor([3, 5, 7]),
            positions[:1, :, :3],
            start[:1, :3],
            end[:1, :3],
        )
    torch.testing.assert_close(read, row[:, -1])  # decoding reads the codes too
    assert change.bytes_after < change.bytes_before * 0.3
    moved = (after - before).norm() / before.norm()
    assert 1e-5 < moved < 0.02
    with pytest.raises(ConfigError, match="bits=3 must be 8 or 4"):
        quantize_head(model, 3)


def test_a_change_of_dtype_leaves_codes_and_scales() -> None:
    model = GLM(CONFIG).init_weights(0)
    list(convert(model, Quantization(bits=4)))
    made = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    scale = made.scale.clone()
    model.to(torch.bfloat16)
    assert made.weight.dtype == torch.int8
    assert torch.equal(made.scale, scale)
    assert made.bias is not None
    assert made.bias.dtype == model.embedding.dtype == torch.bfloat16


def test_streamed_is_the_same_as_converted() -> None:
    whole = GLM(CONFIG).init_weights(0)
    source, how = dict(whole.named_parameters()), Quantization(bits=4, group=32)
    asked: list[str] = []

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        asked.append(name)
        assert source[name].shape == shape
        return source[name].detach().clone()

    made = build_quantized(CONFIG, read, how, torch.float32)
    assert sorted(asked) == sorted(source)
    list(convert(whole, how))
    mine, theirs = made.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert not any(p.requires_grad for p in made.parameters())


def test_gradients_pass_through_a_quantised_base() -> None:
    model = GLM(CONFIG).init_weights(0)
    list(convert(model, Quantization(bits=4, activation_bits=8)))
    tokens, *rest = inputs()
    with use("reference"):
        model.loss(tokens, *rest, tokens, torch.ones(2, 10) / 20).backward()
    norms = [m.weight.grad for m in model.modules() if hasattr(m, "eps")]
    assert all(g is not None and bool(g.abs().max() > 0) for g in norms)


@pytest.mark.parametrize(("devices", "gigabytes"), [(4, 24), (8, 11)])
def test_glm_130b_in_int4_fits_the_published_devices(devices: int, gigabytes: int) -> None:
    memory = device_memory(preset("glm-130b"), Quantization(bits=4), devices, length=2048)
    assert memory.total < gigabytes * GIB
    half = device_memory(preset("glm-130b"), Quantization(bits=8), devices, length=2048)
    assert half.total > gigabytes * GIB  # int8 needs the next size of card
    assert memory.cache == 4 * 70 * 2048 * 12288 // devices


def test_device_memory_counts_what_a_model_holds() -> None:
    how = Quantization(bits=4, group=32)
    model = GLM(CONFIG).init_weights(0).to(torch.bfloat16)
    list(convert(model, how))
    held = model_bytes(model)
    assert device_memory(CONFIG, how, 1, 8).weights == held["total_bytes"]
    assert 0 < held["linears_bytes"] < held["total_bytes"]


def test_rules_that_do_not_exist_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"bits=3 must be 8 or 4; group=48 must be 0"):
        Quantization(bits=3, group=48)


def test_conversion_holds_little_beside_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts allocated bytes with torch's profiler: beyond what remains, one layer in bfloat16 and
    less than one more."""
    config = ModelConfig(num_layers=3, hidden=256, num_heads=4, ffn=1024, vocab=64, max_length=32)
    monkeypatch.setattr(quant, "WORKING_SET", 1 << 14)

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=torch.bfloat16)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        made = build_quantized(config, read, Quantization(bits=4), torch.bfloat16)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = list(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    layer = 2 * sum(p.numel() for p in GLM(config).blocks[0].parameters())
    finished = model_bytes(made)["total_bytes"]
    assert finished <= held[-1] < 1.1 * finished
    assert max(held) - finished < 2 * layer


def test_error_of_a_matrix_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (GLM(CONFIG).init_weights(0) for _ in range(2))
    whole = list(convert(model, Quantization(bits=4)))
    monkeypatch.setattr(quant, "WORKING_SET", 3 * 64)
    assert [x.error for x in convert(other, Quantization(bits=4))] == pytest.approx(
        [x.error for x in whole], rel=1e-6
    )
