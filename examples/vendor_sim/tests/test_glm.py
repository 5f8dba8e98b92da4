"""glm_core on the device: found by its entry point, conforming, training as the CPU does."""

from __future__ import annotations

import pytest
import torch
import vendor_sim

from glm_core.backends import registry
from glm_core.config import TrainConfig
from glm_core.conformance.run import run
from glm_core.model import GLM, preset
from glm_core.optimizer import Optimizer
from glm_core.session import Session

STEPS, B, L, V = 4, 2, 24, 256
KERNELS = {"add_layer_norm", "adamw", "geglu", "linear"}


def train(backend: str, dtype: str = "float32") -> tuple[list[float], Session]:
    """Losses of STEPS steps of a two-layer GLM on random tokens, the same for every backend."""
    device = registry.usable(backend).device()
    config = preset("tiny", num_layers=2, hidden=64, num_heads=4, ffn=96, vocab=V)
    model = GLM(config).init_weights(1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to(device, getattr(torch, dtype))
    optimizer = Optimizer(model, TrainConfig(dtype=dtype))
    optimizer.load_masters(weights)
    generator, losses = torch.Generator().manual_seed(0), []
    with registry.use(backend) as session:
        for _ in range(STEPS):
            model.zero_grad(set_to_none=True)
            loss = model.loss(*(x.to(device) for x in _batch(generator)))
            loss.backward()
            optimizer.step(lr=1e-3)
            losses.append(float(loss.detach()))
    return losses, session


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(0, V, (B, L), generator=generator)
    positions = torch.arange(L).expand(B, 2, L)
    key_start = torch.zeros(B, L, dtype=torch.int32)
    key_end = torch.arange(1, L + 1, dtype=torch.int32).expand(B, L)
    return tokens, positions, key_start, key_end, tokens.roll(-1, 1), torch.full((B, L), 1 / B / L)


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


def test_fallbacks_below_us_are_counted_and_change_nothing() -> None:
    expected, _ = train("sim")
    assert torch.sim.fallback_counts() == {}
    vendor_sim.fault("cpu_fallback", op="aten::_softmax")
    received, _ = train("sim")
    assert received == expected
    assert torch.sim.fallback_counts() == {"aten::_softmax": 2 * STEPS}


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
    torch.sim.set_timeout(0.5)
    vendor_sim.fault(kind, **FAULTS[kind])  # type: ignore[arg-type]
    report = run("sim", op="geglu", mode="test", real=False, dtypes=[torch.float32])
    assert [r.id for r in report.results if r.outcome == "fail"]
