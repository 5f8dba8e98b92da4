"""Checks which ranks are neighbours, in a job of fake processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from glm_core.backends import registry
from glm_core.distributed import mesh
from glm_core.distributed.plan import Plan
from glm_core.errors import ConfigError


@contextmanager
def fake_job(rank: int, world: int) -> Iterator[None]:
    """Joins a job as one rank; the other ranks do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_tensor_parallel_ranks_are_neighbours() -> None:
    with fake_job(5, 12):
        made = mesh.make(Plan(pp=3, dp=2, tp=2), "cpu")
        members = {a: dist.get_process_group_ranks(made.get_group(a)) for a in mesh.AXES}
        assert mesh.ends_group(made) is None
    assert members == {"tp": [4, 5], "dp": [5, 7], "pp": [1, 5, 9]}


def test_the_ends_of_a_pipeline_meet() -> None:
    with fake_job(9, 12):
        group = mesh.ends_group(mesh.make(Plan(pp=3, dp=2, tp=2), "cpu"))
        assert group is not None
        assert dist.get_process_group_ranks(group) == [1, 9]


def test_a_wrong_number_of_processes_is_said() -> None:
    with (
        fake_job(5, 12),
        pytest.raises(ConfigError, match="= 8 processes, started 12; start 8"),
    ):
        mesh.make(Plan(pp=2, dp=2, tp=2), "cpu")


def test_without_a_launcher_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mesh.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE"):
        mesh.start(registry.get("reference"))
