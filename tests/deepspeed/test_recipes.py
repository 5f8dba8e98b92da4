"""Compares schedules value by value with DeepSpeed's classes, and optimizers with their papers'
formulas in float64 (DeepSpeed's own are compiled, or for GPUs only)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import SCHEDULES, STEPS, follow
from torch import Tensor

from glm_core.deepspeed.ops import from_config
from glm_core.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from glm_core.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from glm_core.deepspeed.ops.lamb import FusedLamb
from glm_core.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from glm_core.deepspeed.runtime.lr_schedules import make
from glm_core.errors import ConfigError


def adam(rates: tuple[float, float] = (1e-2, 2e-2)) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in rates]
    )


def test_schedules_take_deepspeeds_course(reference: dict[str, Any]) -> None:
    starts = [(name, params, start) for name, params in SCHEDULES for start in (0, 3)]
    for (name, params, start), theirs in zip(starts, reference["courses"], strict=True):
        mine = follow(lambda o, n=name, p=params: make(n, p, o), adam(), start)
        assert len(mine) == len(theirs) >= STEPS - 1
        for step, (here, there) in enumerate(zip(mine, theirs, strict=True)):
            assert here == [pytest.approx(there[0], rel=1e-15), there[1]], (name, params, step)


def test_one_cycle_without_betas_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0}, optimizer)
    assert schedule.get_mom() is None
    assert "cycle_momentum has no effect: SGD" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("OneCycle", {"cycle_min_lr": 1, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "first"),
        ("OneCycle", {"cycle_min_lr": [1], "cycle_max_lr": 1}, "1 cycle_min_lr for 2"),
        ("OneCycle", {}, "cycle_min_lr"),
        ("LRRangeTest", {"lr_range_test_step_size": 0.5}, "positive integer"),
        ("OneCycel", {}, "did you mean OneCycle"),
    ],
)
def test_a_bad_schedule_is_an_error(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(name, params, adam())


def run(make_one: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> list[Tensor]:
    """Returns the weights after each of ten steps on fixed gradients, for two shapes."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        [torch.randn(s, generator=generator).double() for s in ((5, 7), (3,))] for _ in range(11)
    ]
    weights = [torch.nn.Parameter(w.to(dtype)) for w in draws[0]]
    optimizer, seen = make_one(weights), []
    for gradients in draws[1:]:
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
        seen.append(torch.cat([p.detach().reshape(-1) for p in weights]).clone())
    return seen


class ByHand(torch.optim.Optimizer):
    """Applies an optimizer's formula to one tensor at a time, with state of its own."""

    def __init__(self, params: list[Tensor], formula: Callable[..., Tensor]) -> None:
        super().__init__(params, {})
        self.formula = formula
        self.memory: dict[Tensor, dict[str, Any]] = {
            p: {"t": 0, "m": 0.0, "v": 0.0} for p in params
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p, memory in self.memory.items():
            memory["t"] += 1
            p.copy_(self.formula(p.clone(), p.grad, memory))


def lion(w: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    c = 0.9 * s["m"] + 0.1 * g
    s["m"] = 0.99 * s["m"] + 0.01 * g
    return w - 1e-2 * (c.sign() + 0.1 * w)


def lamb(w: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    s["m"], s["v"] = 0.9 * s["m"] + 0.1 * g, 0.999 * s["v"] + 0.001 * g * g
    u = s["m"] / (s["v"].sqrt() + 1e-8) + 0.1 * w
    ratio = min(max(float(w.norm() / u.norm()), 0.05), 0.6)
    rate = 1e-2 * math.sqrt(1 - 0.999 ** s["t"]) / (1 - 0.9 ** s["t"])
    return w - rate * ratio * u


def adam_w(w: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    s["m"], s["v"] = 0.9 * s["m"] + 0.1 * g, 0.95 * s["v"] + 0.05 * g * g
    m, v = s["m"] / (1 - 0.9 ** s["t"]), s["v"] / (1 - 0.95 ** s["t"])
    return w - 1e-2 * (m / (v.sqrt() + 1e-8) + 0.1 * w)


def adam_l2(w: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    return adam_w(w, g + 0.1 * w, s) + 1e-2 * 0.1 * w


def adagrad(w: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    g = g + 0.1 * w
    s["v"] = s["v"] + g * g
    return w - 1e-2 * g / (s["v"].sqrt() + 1e-10)


COMMON = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS: list[tuple[Any, Any, dict[str, Any]]] = [
    (FusedLion, lion, {"betas": (0.9, 0.99)}),
    (DeepSpeedCPULion, lion, {"betas": (0.9, 0.99)}),
    (FusedLamb, lamb, {"max_coeff": 0.6, "min_coeff": 0.05}),
    (FusedAdam, adam_w, {"betas": (0.9, 0.95)}),
    (DeepSpeedCPUAdam, adam_w, {"betas": (0.9, 0.95)}),
    (DeepSpeedCPUAdam, adam_l2, {"betas": (0.9, 0.95), "adamw_mode": False}),
    (DeepSpeedCPUAdagrad, adagrad, {}),
]


@pytest.mark.parametrize(("kind", "formula", "params"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_optimizers_follow_their_formulas(
    kind: Any, formula: Any, params: dict[str, Any], dtype: torch.dtype
) -> None:
    mine = run(lambda weights: kind(weights, **COMMON, **params), dtype)
    wanted = run(lambda weights: ByHand(weights, formula), torch.float64)
    for step, (here, there) in enumerate(zip(mine, wanted, strict=True)):
        # a few roundings of each weight to a step
        allowed = 4 * (step + 1) * torch.finfo(dtype).eps * there.abs().max()
        assert (here.double() - there).abs().max() <= allowed, step


def test_lamb_tells_its_ratios() -> None:
    weights = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = FusedLamb(weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    first, second = optimizer.get_lamb_coeffs()
    assert first == pytest.approx(0.31622776 / 1, rel=1e-4)  # |w| = 2, |u| = 0.1 / sqrt(1e-3) * 2
    assert second == 1.0  # no norm, no ratio


@pytest.mark.parametrize(
    ("kind", "params", "says"),
    [
        ("Muon", {}, "pass your own"),
        ("OneBitAdam", {}, "pass your own"),
        ("Lamb", {"amsgrad": True}, "amsgrad"),
        ("Lion", {"eps": 1.0}, "eps"),
        ("Adma", {}, "AdamW"),
        ("Adam", {"max_grad_norm": 1.0}, "gradient_clipping"),
    ],
)
def test_a_bad_optimizer_is_an_error(kind: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_config.make(kind, params, [torch.nn.Parameter(torch.zeros(1))])


def test_optimizers_of_whole_parameters_are_refused_where_these_are_cut() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    # torch has it since 2.9; the class's name decides
    muon = getattr(torch.optim, "Muon", None) or type("Muon", (torch.optim.SGD,), {})
    for optimizer, stage, low, good in (
        (FusedLamb([weight]), 0, False, True),
        (FusedLamb([weight]), 0, True, False),
        (FusedLamb([weight]), 2, False, False),
        (FusedLamb([weight]), 3, True, True),
        (muon([weight]), 1, False, False),
        (muon([weight]), 3, False, False),
        (FusedLion([weight]), 2, True, True),
    ):
        if good:
            from_config.check_stage(optimizer, stage, low=low)
        else:
            with pytest.raises(ConfigError, match="whole parameters"):
                from_config.check_stage(optimizer, stage, low=low)
    for stage in (0, 3):
        with pytest.raises(ConfigError, match="without offload"):
            from_config.check_stage(FusedLamb([weight]), stage, low=False, offload=True)
    from_config.check_stage(FusedLion([weight]), 3, low=True, offload=True)


@pytest.mark.parametrize(
    "name",
    [
        "ops.adam.FusedAdam",
        "ops.lamb.FusedLamb",
        "ops.lion.DeepSpeedCPULion",
        "ops.adagrad.DeepSpeedCPUAdagrad",
    ],
)
def test_modules_as_scripts_import_them(name: str) -> None:
    module, _, leaf = name.rpartition(".")
    found = importlib.import_module(f"glm_core.deepspeed.{module}")
    assert issubclass(getattr(found, leaf), torch.optim.Optimizer)
