"""Tests an optimizer in main memory (`train.offload_optimizer`, DeepSpeed's `offload_optimizer`)
beside one on the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_glm
import torch

from glm_core.backends import registry
from glm_core.training import offload
from glm_core.training.checkpoint import FileCheckpoints
from glm_core.training.trainer import Trainer


def trainer(dtype: str, offloads: bool, backend: str = "reference:sim", **rest: Any) -> Trainer:
    c = test_glm.config(backend, dtype)
    changed = dataclasses.replace(c.train, offload_optimizer=offloads, **rest)
    return Trainer(dataclasses.replace(c, train=changed), test_glm.Sampler())


def weights(run: Trainer) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in run.model.parameters()]


def trained(run: Trainer, steps: int) -> list[float]:
    with registry.use(run.backend):
        return [run.step().loss for _ in range(steps)]


@pytest.fixture
def same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the host update by the reference too, as the device `reference:sim` does."""
    monkeypatch.setattr(offload, "HOST", "reference")


@pytest.mark.parametrize(("dtype", "micro_batch"), [("float32", 2), ("bfloat16", 4)])
@pytest.mark.usefixtures("same_arithmetic")
def test_with_the_same_arithmetic_the_bits_are_the_same(
    dtype: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CHUNK", 3000)  # several chunks a step, and tensors beyond one
    there = trainer(dtype, False, micro_batch=micro_batch)
    here = trainer(dtype, True, micro_batch=micro_batch)
    assert trained(there, 3) == trained(here, 3)
    assert all(map(torch.equal, weights(there), weights(here)))
    kept = here.optimizer.state()["tensors"].values()
    assert {t.device.type for t in kept} == {"cpu"}
    assert {p.device.type for p in here.model.parameters()} == {"sim"}


def test_the_hosts_kernel_trains_as_the_devices_does() -> None:
    """float16 gradients are summed in float32, so that kernel and copies have two dtypes."""
    eps = torch.finfo(torch.float16).eps
    here, there = trainer("float16", True, "sim"), trainer("float16", False, "sim")
    assert trained(here, 3) == pytest.approx(trained(there, 3), rel=8 * eps)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("same_arithmetic")
def test_checkpoints_load_both_ways(first: bool, tmp_path: Path) -> None:
    expected = trained(trainer("bfloat16", False), 4)
    begun = trainer("bfloat16", first)
    begun.checkpoints = FileCheckpoints(tmp_path, keep=1)
    losses = trained(begun, 2)
    resumed = trainer("bfloat16", not first)
    resumed.restore(begun.checkpoints.open(begun.save()))
    assert losses + trained(resumed, 2) == expected


def test_the_device_holds_no_masters() -> None:
    def bytes_of(offloads: bool) -> int:
        before = torch.sim.memory_allocated()
        run = trainer("bfloat16", offloads)
        trained(run, 1)
        run.model.zero_grad()
        return int(torch.sim.memory_allocated() - before)

    number = sum(p.numel() for p in trainer("bfloat16", True).model.parameters())
    assert bytes_of(False) - bytes_of(True) == pytest.approx(12 * number, rel=0.02)
