"""Exact runs under plans have the losses, norms and weights of one process, to the bit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from exact_workers import MODELS, config, curve
from ranks import Ranks
from torch import Tensor
from toy import Sampler

from glm_core.distributed import exact, exact_tensor
from glm_core.distributed.plan import lacks, parse
from glm_core.errors import ConfigError
from glm_core.training.trainer import Trainer
from glm_core.versions import lack_of, torch_has

STEPS = 2
RUNS = {
    2: [
        ("dp=2,micro_batches=2", "tied", "bfloat16"),
        ("dp=2,zero=1", "untied", "bfloat16"),
        ("dp=2,zero=3>pp=2", "experts", "float32"),
        ("tp=2,sp=true", "untied", "float32"),
        ("dp=2,ep=2", "experts", "float32"),
    ],
    4: [
        ("dp=2,pp=2,zero=1", "untied", "float32"),
        ("dp=2,pp=2", "tied", "bfloat16"),
        ("dp=2,tp=2", "tied", "bfloat16"),
    ],
}
"""by number of processes: plan, before and after a checkpoint; model; dtype"""


def reason_to_skip(labels: str, model: str, dtype: str) -> str:
    """Returns why this torch cannot do a run, or ""."""
    plans = [parse(label) for label in labels.split(">")]
    split = any(plan.pp > 1 for plan in plans) and MODELS[model].tied_head
    lack = lack_of("grad_dtype", labels) if split and dtype == "bfloat16" else ""
    return "; ".join(filter(None, [*(r for plan in plans for r in lacks(plan)), lack]))


@functools.cache
def alone(model: str, dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the curve and the weights of one process."""
    trainer = Trainer(config(model, dtype, STEPS), Sampler())
    return curve(trainer, STEPS), trainer.optimizer.master


@pytest.fixture(scope="module")
def folders(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Does all runs of a number of processes in one job; returns its folder."""
    found = {}
    for world, runs in RUNS.items():
        able = [None if reason_to_skip(*run) else run for run in runs]
        folder = found[world] = tmp_path_factory.mktemp(f"exact-{world}")
        job = ranks.run("exact_workers.train", world, able, STEPS, str(folder), folder=folder)
        assert job.codes == [0] * world, job.told
    return found


@pytest.mark.parametrize(
    ("world", "run"),
    [
        pytest.param(world, run, id="-".join(words))
        for world, runs in RUNS.items()
        for run, words in enumerate(runs)
    ],
)
def test_plans(folders: dict[int, Path], world: int, run: int) -> None:
    if reason := reason_to_skip(*RUNS[world][run]):
        pytest.skip(reason)
    expected, weights = alone(*RUNS[world][run][1:])
    seen = set()
    for rank in range(world):
        found, parts = torch.load(folders[world] / f"{run}-{rank}.pt")
        assert torch.equal(found, expected), rank
        for name, place, part in parts:
            index = tuple(slice(at, at + n) for at, n in zip(place, part.shape, strict=True))
            assert torch.equal(weights[name][index], part), (rank, name)
            seen.add(name)
    assert seen == set(weights)


def test_weights_travel_once() -> None:
    weight = torch.ones(2, 2)
    calls: list[Tensor] = []

    def exchange() -> Tensor:
        calls.append(weight)
        return weight * 2

    for _ in range(2):
        with exact_tensor.keeping_parts():
            for _ in range(3):
                assert torch.equal(exact_tensor.kept(weight, exchange), weight * 2)
    assert len(calls) == 2
    exact_tensor.kept(weight, exchange)
    exact_tensor.kept(weight, exchange)
    assert len(calls) == 4


def test_refused_by_name() -> None:
    job = config("tied", "float32")
    for label, fact in (
        ("pp=2,schedule=zbv,virtual=2", "schedule=zbv"),
        ("dp=3", "dp=3"),
    ):
        with pytest.raises(ConfigError, match=f"train.exact=True.*{fact}"):
            exact.ExactProcesses(job, parse(label))
    growth = {"ramp_from": 8, "ramp_increment": 8, "ramp_samples": 1, "global_batch": 16}
    grown = dataclasses.replace(job, train=dataclasses.replace(job.train, **growth))
    with pytest.raises(ConfigError, match="do not grow"):
        exact.ExactProcesses(grown, parse("dp=2"))
    learned = dataclasses.replace(MODELS["tied"], positions="learned_2d")
    balanced = dataclasses.replace(MODELS["experts"], balance_weight=0.1)
    cut = "dp=2,zero=1" if torch_has("grad_dtype") else "pp=2"
    for model, dtype, label, fact in (
        (MODELS["tied"], "bfloat16", cut, "tied head"),
        (MODELS["experts"], "float32", "tp=2", "tp cuts sums over heads"),
        (MODELS["experts"], "bfloat16", "dp=2,ep=2", "ep adds an expert's gradients"),
        (learned, "float32", "tp=2,sp=true", "sp cuts a position table's"),
        (balanced, "float32", "pp=2", "auxiliary loss"),
        (MODELS["tied"], "float32", "dp=2,pp=2,zero=1", "ZeRO adds a tied head's"),
        (MODELS["experts"], "float32", "dp=2,pp=2,zero=1", "ZeRO adds the embedding's"),
    ):
        other = dataclasses.replace(config("tied", dtype), model=model)
        with pytest.raises(ConfigError, match=f"train.exact=True.*{fact}"):
            exact.ExactProcesses(other, parse(label))
