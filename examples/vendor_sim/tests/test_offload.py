"""Tests an optimizer in main memory (`train.offload_optimizer`, DeepSpeed's `offload_optimizer`)
beside one on the device."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_glm
import torch
import torch.distributed as dist
import vendor_sim
from torch import nn

from glm_core import deepspeed
from glm_core.backends import registry
from glm_core.deepspeed.accelerator import real_accelerator
from glm_core.distributed import fsdp
from glm_core.training import offload
from glm_core.training.checkpoint import FileCheckpoints
from glm_core.training.trainer import Trainer


def trainer(dtype: str, offloads: bool, backend: str = "reference:sim", **rest: Any) -> Trainer:
    c = small_glm.config(backend, dtype)
    changed = dataclasses.replace(c.train, offload_optimizer=offloads, **rest)
    return Trainer(dataclasses.replace(c, train=changed), small_glm.Sampler())


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


# --- DeepSpeed's offload_optimizer ---------------------------------------------------------------


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets scripts run on the device, in a job of one rank."""
    monkeypatch.setattr(real_accelerator, "_chosen", [registry.usable("sim")])
    yield
    dist.destroy_process_group()


def engine(stage: int, offloads: bool, low: bool, optimizer: Any = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Linear(32, 5))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 200}
    if offloads:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "zero_optimization": zero,
        "bf16": {"enabled": low},
    }
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]


def updates(run: Any, first: int, last: int) -> list[float]:
    """Returns the losses of these micro-batches, two of which are an update."""
    losses = []
    for number in range(first, last):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number)).to("sim")
        loss = run(x.to(next(run.module.parameters()).dtype)).float().square().mean()
        run.backward(loss)
        run.step()
        losses.append(loss.item())
    return losses


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("stage", "low", "optimizer"),
    [(0, False, sgd), (1, True, None), (2, True, sgd), (2, False, None)],
)
@pytest.mark.usefixtures("one_rank")
def test_a_deepspeed_script_trains_the_same_in_main_memory(
    stage: int, low: bool, optimizer: Callable[..., Any] | None
) -> None:
    there, here = (engine(stage, offloads, low, optimizer) for offloads in (False, True))
    # torch's AdamW and the host's kernel round differently
    exact = optimizer is sgd
    expected, received = updates(there, 0, 6), updates(here, 0, 6)
    assert received == (expected if exact else pytest.approx(expected, rel=1e-6))
    assert max(expected) > 1.5 * min(expected)
    assert here.get_global_grad_norm() == pytest.approx(there.get_global_grad_norm(), rel=1e-6)
    masters = [m for store in here.stores for m in store.masters]
    state = [t for m in masters for t in here.optimizer.state[m].values()]
    assert {t.device.type for t in (*masters, *state)} == {"cpu"}
    assert {p.device.type for p in here.module.parameters()} == {"sim"}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:barrier", "ignore:No device id")  # there is only one device
def test_a_deepspeed_checkpoint_loads_both_ways(first: bool, tmp_path: Path) -> None:
    expected = updates(engine(2, False, True), 0, 6)
    begun = engine(2, first, True)
    losses = updates(begun, 0, 4)
    begun.save_checkpoint(str(tmp_path))
    resumed = engine(2, not first, True)
    resumed.load_checkpoint(str(tmp_path))
    assert losses + updates(resumed, 4, 6) == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(bool(fsdp.lack()), reason=fsdp.lack())
@pytest.mark.usefixtures("one_rank")
def test_zero_3_waits_for_gradients_that_are_on_their_way() -> None:
    run = engine(3, True, True, sgd)
    vendor_sim.fault("hang", op="sim::to_host")
    run.backward(run(torch.ones(4, 7, dtype=torch.bfloat16).to("sim")).float().sum())
    assert torch.sim.pending()
    clock = threading.Timer(0.1, vendor_sim.clear_faults)
    clock.start()
    parts = [part.tensor for part in run.stores[0].gradient_parts(lambda p: 1)]
    sizes = [int(part.count_nonzero()) for part in parts]
    clock.join()
    assert sizes == [32 * 7, 32, 5 * 32, 5]


# --- two ranks, whose devices exchange tensors by the device's own library ------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what `ranks.py` reports of each rank."""
    if reason := fsdp.lack():
        pytest.skip(reason)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), port, str(folder)],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},  # it starts the device
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("run", ["zero 2", "zero 3", "plan 1", "plan 2", "plan 3"])
def test_two_ranks_train_to_the_same_bits(run: str, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        expected = rank[run]["device"]
        assert len(set(expected["losses"])) == len(expected["losses"])
        for place, received in rank[run].items():
            for figure in ("losses", "norm", "weights", "moments"):
                assert received[figure] == expected[figure], (place, figure)
            assert received["places"] == (["sim"] if place == "device" else ["cpu"])


def test_two_ranks_with_the_hosts_kernel_train_as_with_torchs(
    two_ranks: list[dict[str, Any]],
) -> None:
    for rank in two_ranks:
        expected, *others = rank["adamw"]
        for received in others:
            assert received == pytest.approx(expected, rel=1e-6)


def test_between_steps_a_device_holds_only_what_is_not_in_main_memory(
    two_ranks: list[dict[str, Any]],
) -> None:
    """SGD has a moment of 4 bytes a weight; gradients are there during a step only."""
    weights = 3 * (64 * 64 + 64) + 5 * 64 + 5
    per_weight = {
        "zero 2": {"device": 2 + (4 + 4) / 2, "optimizer": 2},
        "zero 3": {"device": (4 + 4) / 2, "optimizer": 4 / 2, "both": 0},
    }
    for rank in two_ranks:
        for run, expected in per_weight.items():
            received = {place: rank[run][place]["bytes"] / weights for place in expected}
            assert received == pytest.approx(expected, abs=0.1), run
