"""Exact runs: loss curve and weights have the same bits whatever the micro-batches are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core.backends import registry
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.errors import ConfigError
from glm_core.model.presets import preset
from glm_core.training.row_tree import RowTree
from glm_core.training.run import run
from glm_core.training.trainer import Trainer
from tests.shared.toy import L, Sampler, V

STEPS = 2
DATA = DataConfig(length=L, vocab=V)


SMALL = {"num_layers": 2, "hidden": 64, "vocab": V, "max_length": L}
MODELS = {"dense": preset("tiny", ffn=48, **SMALL), "experts": preset("tiny-moe", **SMALL)}


def curve(model: ModelConfig, dtype: str, micro_batch: int, exact: bool = True) -> list[Tensor]:
    """Returns the losses, the gradient norms and the final weights of a run of 6 sequences a
    step."""
    train = TrainConfig(
        dtype=dtype,  # type: ignore[arg-type]  # checked by TrainConfig
        exact=exact,
        micro_batch=micro_batch,
        global_batch=6,
        steps=STEPS,
        warmup_steps=1,
    )
    trainer = Trainer(RunConfig(model=model, data=DATA, train=train), Sampler())
    with registry.use("cpu", exact=exact):
        results = [trainer.step() for _ in range(STEPS)]
    figures = torch.tensor([(r.loss, r.grad_norm) for r in results], dtype=torch.float64)
    return [figures, *trainer.optimizer.master.values()]


@pytest.mark.parametrize(
    ("model", "dtype"), [("dense", "float32"), ("dense", "bfloat16"), ("experts", "float32")]
)
def test_micro_batches(model: str, dtype: str) -> None:
    first = curve(MODELS[model], dtype, 6)
    assert first[0].isfinite().all()
    for micro_batch in (1, 2):
        other = curve(MODELS[model], dtype, micro_batch)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), micro_batch


def test_the_fast_run_differs() -> None:
    """Otherwise nothing above could fail."""
    a, b = (curve(MODELS["dense"], "float32", m, exact=False) for m in (6, 1))
    assert not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sequences", [1, 2, 3, 6, 7])
def test_pairs_are_added_in_place(sequences: int) -> None:
    """Torch's sum of two neighbours is the tree's, and the tree holds one gradient for both."""
    drawn = torch.randn(sequences, 1000, generator=torch.Generator().manual_seed(0))

    def summed(pairs: bool) -> Tensor:
        layer = torch.nn.Linear(1000, 1, bias=False)
        tree = RowTree(layer, pairs)
        for row in drawn:
            layer(row).sum().backward()
            tree.add()
        assert (layer.weight.grad is not None) == (pairs and sequences % 2 == 1)
        tree.finish()
        assert layer.weight.grad is not None
        return layer.weight.grad

    assert torch.equal(summed(True), summed(False))


def test_refused_by_name() -> None:
    config = RunConfig(model=MODELS["dense"], data=DATA, train=TrainConfig(exact=True))
    with pytest.raises(ConfigError, match="the session is not exact"), registry.use("cpu"):
        Trainer(config, Sampler()).step()
    compiled = dataclasses.replace(config.train, compile=True)
    with pytest.raises(ConfigError, match=r"train.compile=True: not together with train.exact"):
        Trainer(dataclasses.replace(config, train=compiled), Sampler())


@pytest.mark.parametrize(
    ("train", "fact"),
    [
        ({"exact": True, "backend": "reference"}, "reference sums in no fixed order"),
        ({"exact": True, "compile": True}, "not together with train.exact"),
        ({"graph": True}, "records no graphs"),
        ({"backend": "null"}, "computes shapes and no values"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_the_data_is_read(
    train: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    data = dataclasses.replace(DATA, path=str(tmp_path / "no text"))
    config = RunConfig(model=MODELS["dense"], data=data, train=TrainConfig(**train))
    with pytest.raises(ConfigError, match=fact):
        run(config, tmp_path / "out")
