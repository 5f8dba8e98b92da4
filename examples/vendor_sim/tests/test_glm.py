"""Tests glm_core on the device: its entry point is found, conformance passes, training matches the
CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vendor_sim
from small_glm import STEPS, Sampler, config

from glm_core.align import fallbacks
from glm_core.backends import registry
from glm_core.conformance.run import run
from glm_core.model.sample import Sampling, choose
from glm_core.session import Session
from glm_core.training.checkpoint import FileCheckpoints
from glm_core.training.trainer import Trainer

KERNELS = {"add_layer_norm", "adamw", "geglu", "linear"}


def train(backend: str, dtype: str = "float32") -> tuple[list[float], Session]:
    """Returns the losses of a short run."""
    trainer = Trainer(config(backend, dtype), Sampler())
    with registry.use(backend) as session:
        return [trainer.step().loss for _ in range(STEPS)], session


def test_found_by_entry_point() -> None:
    backend = registry.usable("sim")
    assert backend.device() == torch.device("sim", 0)
    assert set(backend.kernels) == KERNELS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_are_the_reference_s_to_rounding(dtype: str) -> None:
    expected, _ = train("reference", dtype)
    received, _ = train("sim", dtype)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert received == pytest.approx(expected, rel=8 * eps)
    assert max(expected) - min(expected) > 64 * torch.finfo(torch.float32).eps * expected[0]


def test_every_op_without_kernel_is_a_recorded_fallback() -> None:
    _, session = train("sim")
    used = {"attention", "embedding", "global_norm", "layer_norm", "linear_cross_entropy", "rope"}
    assert {f.op for f in session.fallbacks} == used
    assert {f.reason for f in session.fallbacks} == {"no kernel for this op"}


def test_fallbacks_below_us_are_reported_and_change_nothing() -> None:
    expected, _ = train("sim")
    assert registry.usable("sim").runtime_fallbacks() == {}
    vendor_sim.fault("cpu_fallback", op="aten::_softmax")
    received, _ = train("sim")
    assert received == expected
    assert registry.usable("sim").runtime_fallbacks() == {"aten::_softmax": 2 * 2 * STEPS}
    found = fallbacks.measure(config(), Sampler(), "sim")
    assert {(r.op, r.calls) for r in found.rows if r.where == "host"} == {("attention", 4)}


def test_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    expected, _ = train("sim")
    checkpoints = FileCheckpoints(tmp_path, keep=1)
    first = Trainer(config(), Sampler(), checkpoints=checkpoints)
    with registry.use("sim"):
        begun = [first.step().loss for _ in range(2)]
    torch.sim.manual_seed(9)
    path = first.save()
    torch.sim.manual_seed(8)
    second = Trainer(config(), Sampler())
    second.restore(checkpoints.open(path))
    assert torch.sim.get_rng_state()[0].item() == 9
    with registry.use("sim"):
        assert begun + [second.step().loss for _ in range(2)] == expected


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_kernels_conform(op: str) -> None:
    report = run("sim", op=op, real=False)
    assert [r for r in report.results if r.outcome not in ("pass", "unsupported")] == []
    passed = [r for r in report.results if r.outcome == "pass"]
    assert len(passed) > len(report.results) / 2


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy", "rope"])
def test_references_conform_on_the_device(op: str) -> None:
    report = run("reference:sim", op=op, real=False, dtypes=[torch.bfloat16])
    assert report.results
    assert [r for r in report.results if r.outcome != "pass"] == []


FAULTS = {
    "wrong_op": {"op": "sim::geglu"},
    "tanh_gelu": {},
    "bit_flip": {"op": "sim::geglu", "call": 5},
    "stale_buffer": {"op": "sim::geglu"},
    "missing_dtype": {"dtype": "float32"},
    "out_of_memory": {"value": 64},
    "device_lost": {"op": "sim::geglu", "call": 5},
    "hang": {"op": "sim::geglu", "call": 5},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_conformance_sees_the_fault(kind: str) -> None:
    if kind == "hang":
        torch.sim.set_timeout(0.5)
    vendor_sim.fault(kind, **FAULTS[kind])  # type: ignore[arg-type]  # checked when it is set
    report = run("sim", op="geglu", mode="test", real=False, dtypes=[torch.float32])
    assert [r.id for r in report.results if r.outcome == "fail"]


def test_sampling_without_float64_goes_on_the_host() -> None:
    logits, draws = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), [0.3, 0.7]
    expected = choose(logits, [Sampling(temperature=1.0)] * 2, draws)
    vendor_sim.fault("missing_dtype", dtype="float64")
    assert choose(logits.to("sim"), [Sampling(temperature=1.0)] * 2, draws) == expected
