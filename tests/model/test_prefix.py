"""P-Tuning v2 equals attention written out, packed and padded; it works with a cache, and it
trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prefixes import B, L, P, batch, written_out
from toy import OneWord, base, config

from glm_core import ops
from glm_core.errors import CheckpointError, ConfigError, ShapeError
from glm_core.model.adapters import (
    AdapterConfig,
    attach,
    merge,
)
from glm_core.model.cache import Cache
from glm_core.model.glm import GLM
from glm_core.pretrained.adapters import load_adapter, save_adapter
from glm_core.training.run import run

TUNING = AdapterConfig(kind="ptuning", prefix_length=P)


def tuned(tuning: AdapterConfig = TUNING, **model: Any) -> GLM:
    """A model with a prefix large enough to matter."""
    glm = GLM(config({"num_heads": 4, "num_kv_heads": 2, "init_std": 0.3, **model}).model)
    attach(glm.init_weights(1).double(), tuning)
    glm.get_parameter("prefix.table").data.mul_(3)
    return glm


def test_equals_attention_written_out() -> None:
    glm, given = tuned(), batch()
    counted = torch.ones(B, L, dtype=torch.bool)
    counted[2, :2], counted[3, 9:] = False, False  # pads
    expected = written_out(glm, given)[counted]
    torch.testing.assert_close(glm.logits(**given)[counted], expected, rtol=1e-6, atol=1e-7)
    glm.get_parameter("prefix.table").data.zero_()
    assert (glm.logits(**given)[counted] - expected).abs().max() > 0.01


@torch.no_grad()
def test_with_a_cache_token_by_token() -> None:
    """Reads a prompt of six tokens behind two pads, then one token at a time."""
    glm, given = tuned(), {k: v[2:3] for k, v in batch().items()}
    expected = glm.logits(**given)[:, 2:]
    cache = Cache(glm.config, 1, 20, torch.float64)
    found = []
    for part in (slice(0, 6), *(slice(i, i + 1) for i in range(6, L))):
        window = cache.window(0, torch.arange(L)[None, part])
        call = {k: v[..., part] for k, v in given.items()}
        found.append(ops.linear(glm(**call, cache=window), glm.head_weight))
    torch.testing.assert_close(torch.cat(found, 1)[:, 2:], expected, rtol=1e-6, atol=1e-7)


def test_only_the_prefix_is_trained(tmp_path: Path) -> None:
    model = base()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(model, TUNING)
    settings = config(lr=0.5, min_lr=0.1, steps=30, save_every=0, weight_decay=0.0)
    run(settings, tmp_path / "run", sampler=OneWord(), model=model)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]
    assert min(losses[-3:]) < losses[0] - 0.5
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in before)
    save_adapter(tmp_path / "a.safetensors", model, TUNING)
    again = base()
    assert load_adapter(tmp_path / "a.safetensors", again) == TUNING
    given = {k: v % 16 if k == "tokens" else v for k, v in batch().items()}
    assert torch.equal(again.logits(**given), model.logits(**given))


def test_refusals(tmp_path: Path) -> None:
    glm, given = tuned(), batch()
    given["key_start"][0, 6:] = 3
    with pytest.raises(ShapeError, match="key_start points before its own sample"):
        glm.logits(**given)
    with pytest.raises(ConfigError, match="a prefix is part of no weight"):
        merge(glm)
    save_adapter(tmp_path / "a.safetensors", glm, TUNING)
    with pytest.raises(CheckpointError, match=r"prefix.table is \[3, 32\], expected \[3, 64\]"):
        load_adapter(tmp_path / "a.safetensors", base())
    with pytest.raises(ConfigError, match="kind must be one of lora, ptuning"):
        AdapterConfig(kind="prefix")  # type: ignore[arg-type]  # no such kind
