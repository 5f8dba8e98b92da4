"""Exact runs under dp have the losses, norms and weights of one process, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exact_workers import config, figures
from ranks import Ranks
from toy import Sampler

from glm_core.distributed import exact
from glm_core.distributed.plan import parse
from glm_core.errors import ConfigError
from glm_core.training.trainer import Trainer


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


@pytest.mark.parametrize(("label", "world"), [("dp=2,micro_batches=2", 2), ("dp=4", 4)])
def test_data_parallel(ranks: Ranks, tmp_path: Path, label: str, world: int) -> None:
    job = ranks.run("exact_workers.train", world, label, str(tmp_path), folder=tmp_path)
    assert job.codes == [0] * world, job.told
    expected = figures(Trainer(config(), Sampler()))
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), rank


def test_refused_by_name() -> None:
    alone = "under dp and micro_batches alone"
    for label, fact in (("pp=2", alone), ("zero=1,dp=2", alone), ("dp=3", "dp=3")):
        with pytest.raises(ConfigError, match=f"train.exact=True .*{fact}"):
            exact.ExactProcesses(config(), parse(label))
    growth = {"ramp_from": 8, "ramp_increment": 8, "ramp_samples": 1, "global_batch": 16}
    grown = dataclasses.replace(config().train, **growth)
    with pytest.raises(ConfigError, match="do not grow"):
        exact.ExactProcesses(dataclasses.replace(config(), train=grown), parse("dp=2"))
