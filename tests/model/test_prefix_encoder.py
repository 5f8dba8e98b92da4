"""ChatGLM's prefix is computed by an MLP, has dropout in training, and is read from and written to
its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from prefixes import B, L, P, batch, written_out
from safetensors.torch import save_file
from torch import nn
from toy import OneWord, config

from glm_core.errors import CheckpointError, ConfigError
from glm_core.model.adapters import AdapterConfig, LoRA, adapter_state, attach
from glm_core.model.glm import GLM, Linear
from glm_core.model.prefix import PrefixWindow
from glm_core.model.quantize import Quantization, convert
from glm_core.pretrained.adapters import load_adapter, read, save_adapter, write
from glm_core.training.run import run

FRONT = "transformer.prefix_encoder."
PROJECTED = AdapterConfig(kind="ptuning", prefix_length=P, prefix_projection=True, dropout=0.2)


class PrefixEncoder(nn.Module):
    """As modeling_chatglm.py describes it, from torch's own parts."""

    def __init__(self, width: int, hidden: int, values: int, projection: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(P, width)
        if projection:
            self.trans = nn.Sequential(
                nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, values)
            )
        self.projection = projection

    def forward(self) -> torch.Tensor:
        rows: torch.Tensor = self.embedding(torch.arange(P))
        return self.trans(rows) if self.projection else rows


def base(**model: Any) -> GLM:
    sizes = {"num_heads": 4, "init_std": 0.3, **model}
    return GLM(config(sizes).model).init_weights(1).double()


@pytest.mark.parametrize("kind", ["chatglm-6b", "chatglm2", "table"])
def test_published_files(kind: str, tmp_path: Path) -> None:
    """A file that is read gives the logits of the encoder's own values; a file that is written
    holds its state, value by value."""
    torch.manual_seed(3)
    heads = 4 if kind == "chatglm-6b" else 2
    values = 2 * 2 * heads * 4
    width = 16 if kind == "chatglm-6b" else values
    encoder = PrefixEncoder(width, 16, values, kind != "table").double()
    state = {FRONT + k: v for k, v in encoder.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model, given = base(num_kv_heads=heads), batch()
    found = load_adapter(tmp_path, model, train=True)
    assert (found.prefix_length, found.dropout) == (P, 0.1)
    assert found.table_width(model.config) == (0 if kind == "table" else width)
    default = dataclasses.replace(found, prefix_width=0)  # the published width of this family
    assert default.table_width(model.config) == found.table_width(model.config)
    seen = torch.ones(B, L, dtype=torch.bool)
    seen[2, :2], seen[3, 9:] = False, False  # pads
    expected = written_out(model, given, encoder().detach())[seen]
    logits = model.eval().logits(**given)
    torch.testing.assert_close(logits[seen], expected, rtol=1e-6, atol=1e-7)

    used = base(num_kv_heads=heads)
    told = load_adapter(tmp_path / "pytorch_model.bin", used)
    assert torch.equal(used.logits(**given), logits)
    assert adapter_state(used).keys() == {"prefix.table"}  # the MLP is not run at each call
    assert (told.prefix_projection, told.dropout) == (False, 0.0)

    save_adapter(tmp_path / "ours.safetensors", model, found)
    write(tmp_path / "back.bin", *read(tmp_path / "ours.safetensors"))
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_dropout_of_a_prefix() -> None:
    """Each value of each row is dropped by itself and kept ones are scaled up; the text's keys do
    not change."""
    torch.manual_seed(0)
    values = torch.rand(P, 4, 2, 8) + 1
    k = torch.randn(500, 1, 2, 8)
    index = torch.arange(P + 1).expand(500, -1)
    keys, _ = PrefixWindow(values, index, None, 0.2).append(1, k, k)
    assert torch.equal(keys[:, P:], k)
    kept = values[:, 2] / 0.8  # layer 1's keys
    front, dropped = keys[:, :P], keys[:, :P] == 0
    torch.testing.assert_close(front[~dropped], kept.expand_as(front)[~dropped])
    assert abs(float(dropped.double().mean()) - 0.2) < 0.02  # 8 standard deviations
    assert dropped.double().mean(0).max() < 0.4  # rows draw apart
    whole, _ = PrefixWindow(values, index, None).append(1, k, k)
    assert torch.equal(whole[:, :P], values[:, 2].expand(500, -1, -1, -1))
    model, given = attach(base(), PROJECTED), batch()
    assert not torch.equal(model.logits(**given), model.logits(**given))
    model.eval()
    assert torch.equal(model.logits(**given), model.logits(**given))


def test_dropout_of_lora() -> None:
    linear, x = Linear(8, 6, bias=True).double(), torch.randn(5, 8).double()
    lora = LoRA(linear, (6, 8), AdapterConfig(rank=2, dropout=0.5)).double()
    for parameter in lora.parameters():
        parameter.data.normal_()
    torch.manual_seed(7)
    found = lora(x)
    torch.manual_seed(7)
    fed = nn.functional.dropout(x, 0.5)
    expected = linear(x) + 8 * fed @ lora.lora_a.T @ lora.lora_b.T
    torch.testing.assert_close(found, expected)
    lora.eval()
    torch.testing.assert_close(lora(x), linear(x) + 8 * x @ lora.lora_a.T @ lora.lora_b.T)


def test_trained_on_a_quantized_base(tmp_path: Path) -> None:
    """The loss falls and the codes do not change. A resumed run has the same bits, dropout
    included, and the saved adapter makes the same model again."""

    def built() -> GLM:
        model = GLM(config({"init_std": 0.2}).model).init_weights(1)
        list(convert(model, Quantization(bits=4)))
        return attach(model, PROJECTED)

    settings = config(lr=0.05, min_lr=0.05, steps=16, save_every=8, weight_decay=0.0, keep=3)
    model = built()
    codes = model.blocks[0].attention.qkv.weight.clone()
    run(settings, tmp_path / "run", sampler=OneWord(), model=model)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]
    assert min(losses[-3:]) < losses[0] - 1
    assert torch.equal(model.blocks[0].attention.qkv.weight, codes)
    [half] = (tmp_path / "run/checkpoints").glob("*8.safetensors")
    again = built()
    run(settings, tmp_path / "again", sampler=OneWord(), model=again, resume=half)
    state = adapter_state(model)
    assert len(state) == 5
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(again).items())

    save_adapter(tmp_path / "a.safetensors", model, PROJECTED)
    plain = GLM(model.config).init_weights(1)
    list(convert(plain, Quantization(bits=4)))
    load_adapter(tmp_path / "a.safetensors", plain)
    given = {k: v % 16 if k == "tokens" else v for k, v in batch().items()}
    assert torch.equal(plain.logits(**given), model.eval().logits(**given))


def test_refusals(tmp_path: Path) -> None:
    config = dataclasses.asdict(PROJECTED)
    for change, told in [
        ({"dropout": 1.0}, "dropout=1.0 must lie in 0 ... 1"),
        ({"kind": "lora"}, "prefix_projection=True belongs to ptuning"),
        ({"prefix_projection": False, "prefix_width": 4}, "prefix_width=4 must be positive, and"),
    ]:
        with pytest.raises(ConfigError, match=told):
            AdapterConfig(**{**config, **change})
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no adapter; expected adapter.safetensors"):
        load_adapter(tmp_path / "a.safetensors", base())
    torch.save({FRONT + "embedding.weight": torch.zeros(2)}, tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match=r"holds embedding.weight; expected embedding.weight"):
        read(tmp_path / "b.bin")
    torch.save({FRONT + "embedding.weight": torch.zeros(P, 9)}, tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match=r"prefix.table is \[3, 9\], expected \[3, 64\]"):
        load_adapter(tmp_path / "b.bin", base())
    lora = adapter_state(attach(base(), AdapterConfig()))
    for name in ("c.bin", "c.txt"):
        with pytest.raises(CheckpointError, match="a prefix also as ChatGLM's pytorch"):
            write(tmp_path / name, AdapterConfig(), lora)
    with pytest.raises(CheckpointError, match="not saved"):
        write(tmp_path / "none/c.bin", *read(tmp_path / "b.bin"))
    assert {f.name for f in tmp_path.iterdir()} == {"a.safetensors", "b.bin"}
