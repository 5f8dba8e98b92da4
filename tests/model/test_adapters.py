"""LoRA trains and saves the adapters alone, and merging them does not change the model's
results."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy import OneWord, Sampler, base, config

from glm_core import ops
from glm_core.errors import CheckpointError, ConfigError
from glm_core.model.adapters import (
    AdapterConfig,
    adapter_state,
    attach,
    merge,
)
from glm_core.model.glm import GLM
from glm_core.ops.quant import quantize
from glm_core.pretrained.adapters import load_adapter, save_adapter
from glm_core.training.run import run

ALL = AdapterConfig(rank=3, targets="attention.qkv attention.out mlp.up mlp.down")


def inputs() -> tuple[Tensor, ...]:
    batch = Sampler().next(3)
    return batch.tokens, batch.positions, batch.key_start, batch.key_end


def trained(model: GLM, folder: Path, dtype: str = "float32") -> list[float]:
    """The losses of twenty steps."""
    settings = config(lr=0.05, min_lr=0.05, dtype=dtype, steps=20, save_every=0)
    result = run(settings, folder, sampler=OneWord(), model=model)
    assert result.steps == 20
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in text]


def test_nothing_changes_before_training() -> None:
    model = base()
    before = model.logits(*inputs())
    attach(model, ALL)
    assert torch.equal(model.logits(*inputs()), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [*adapter_state(model)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_are_trained(tmp_path: Path, dtype: str) -> None:
    model = base().to(getattr(torch, dtype))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = trained(attach(model, ALL), tmp_path / "run", dtype)
    assert min(losses[-3:]) < losses[0] - 1
    after = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    saved = next((tmp_path / "run/checkpoints").glob("*.safetensors"))
    assert saved.stat().st_size < 80_000  # three float32 copies of the adapters, no base


class Quantized(nn.Module):
    """A linear with int8 codes."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        codes, scale = quantize(linear.get_parameter("weight"), 8)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(x, self.weight, self.scale, self.bias)


def test_on_a_quantized_base(tmp_path: Path) -> None:
    model = base()
    for block in model.blocks:
        block.attention.qkv = Quantized(block.attention.qkv)
        block.mlp.up, block.mlp.down = Quantized(block.mlp.up), Quantized(block.mlp.down)
    codes = model.blocks[0].attention.qkv.weight.clone()
    losses = trained(attach(model, ALL), tmp_path / "run")
    assert min(losses[-3:]) < losses[0] - 1
    assert torch.equal(model.blocks[0].attention.qkv.base.weight, codes)
    with pytest.raises(ConfigError, match="a LoRA cannot be added to a quantized weight"):
        merge(model)


def test_merging_keeps_what_the_model_computes() -> None:
    model = attach(base().double(), ALL)
    for parameter in adapter_state(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    expected = model.logits(*inputs())
    plain = merge(model)
    assert plain.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(plain.logits(*inputs()), expected, rtol=1e-5, atol=1e-6)
    changed = (plain.logits(*inputs()) - base().double().logits(*inputs())).abs().max()
    assert changed > 0.01


def test_saved_apart_and_loaded(tmp_path: Path) -> None:
    model = attach(base(), ALL)
    for parameter in adapter_state(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    save_adapter(tmp_path / "a.safetensors", model, ALL)
    again = base()
    assert load_adapter(tmp_path / "a.safetensors", again) == ALL
    assert torch.equal(again.logits(*inputs()), model.logits(*inputs()))


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(path, attach(base(), ALL), ALL)
    wider = GLM(config({"hidden": 32}).model).init_weights(0)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(CheckpointError, match=r"lora_a is \[3, 16\], expected \[3, 32\].*and \d+"):
        load_adapter(path, wider)
    assert wider.state_dict().keys() == before.keys()
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="truncated or not an adapter"):
        load_adapter(path, base())
    with pytest.raises(ConfigError, match="the model has some already"):
        attach(attach(base(), ALL), ALL)
    with pytest.raises(ConfigError, match="rank=0 must be positive"):
        AdapterConfig(rank=0)
    with pytest.raises(ConfigError, match=r"targets=head must be one or more of attention\.qkv"):
        AdapterConfig(targets="head")
