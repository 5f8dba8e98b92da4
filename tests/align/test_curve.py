"""The loss curve is a test: literal losses and the first gradient norm of one small float32 run.

The literals are the fixed control. They change only with a decision to change the model, the data
or the recipe, never because a candidate computes something else; no run is compared with the one
before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig, override
from glm_core.data.sampler import Batch
from glm_core.dispatch import Op
from glm_core.training.parallel import SingleProcess, initial_weights
from glm_core.training.trainer import Trainer

V, L, STEPS = 64, 24, 40
RATIO = 2.0
CONTROLS = 3
EPS = torch.finfo(torch.float32).eps
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden=32,
        num_heads=2,
        ffn=48,
        vocab=V,
        max_length=L,
        qk_layer_scaling=True,
        embedding_gradient_shrink=0.1,
    ),
    data=DataConfig(vocab=V, length=L),
    train=TrainConfig(
        backend="reference",
        steps=STEPS,
        micro_batch=4,
        global_batch=8,
        lr=1e-2,
        min_lr=1e-3,
        warmup_steps=5,
    ),
)
GRAD_NORM = 0.519658327
LOSSES = [
    4.16534615,
    4.16135216,
    4.11329937,
    4.0946331,
    4.08075809,
    3.99287224,
    3.93842459,
    3.75098324,
    3.72194982,
    3.58822489,
    3.49258709,
    3.38497019,
    3.31767035,
    3.21417141,
    3.14605808,
    2.9888773,
    2.97533965,
    2.94836521,
    2.84154224,
    2.86562395,
    2.75210762,
    2.80580115,
    2.76611376,
    2.75912905,
    2.66830349,
    2.62048769,
    2.66790199,
    2.67280078,
    2.60540342,
    2.61816096,
    2.57731628,
    2.58332014,
    2.52047205,
    2.55895281,
    2.58800411,
    2.54245329,
    2.56537008,
    2.51840782,
    2.5552628,
    2.55560017,
]


class Pattern:
    """Makes batches by integer arithmetic, so that every machine sees the same ones: sequence n
    counts in steps of n % 7 + 1 with a quadratic wobble, after a prefix of 4 to 12 tokens."""

    def __init__(self) -> None:
        self.index = 0

    def next(self, micro_batch: int) -> Batch:
        n = torch.arange(self.index, self.index + micro_batch)[:, None]
        self.index += micro_batch
        i = torch.arange(L + 1)
        text, sep = (n * 13 + i * (n % 7 + 1) + (i * i * n) % 5) % V, 4 + n % 9
        place = i[:-1].expand(micro_batch, L)
        return Batch(
            tokens=text[:, :-1],
            labels=text[:, 1:],
            loss_weight=(place >= sep).float(),
            positions=torch.stack((place, (place - sep + 1).clamp(min=0)), 1),
            key_start=torch.zeros(micro_batch, L, dtype=torch.int32),
            key_end=torch.maximum(place + 1, sep).int(),
        )

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def curve(
    config: RunConfig = CONFIG, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, float]:
    """Returns the losses [STEPS] in float64 and the norm of the first gradient."""
    trainer = Trainer(config, Pattern(), SingleProcess(config, weights=weights))
    results = [trainer.step() for _ in range(STEPS)]
    return torch.tensor([r.loss for r in results], dtype=torch.float64), results[0].grad_norm


@functools.cache
def right() -> tuple[Tensor, float]:
    """Returns today's curve, trained once."""
    return curve()


def nudged(seed: int) -> dict[str, Tensor]:
    """Returns the initial weights, each moved by one ulp up or down."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor([-torch.inf, torch.inf])
    return {
        name: torch.nextafter(w, ends[torch.randint(2, w.shape, generator=g)])
        for name, w in initial_weights(CONFIG).items()
    }


@functools.cache
def tolerance() -> tuple[Tensor, float]:
    """Returns the tolerance of the losses [STEPS] and of the gradient norm: RATIO times the largest
    deviation of the control runs up to that step, plus a rounding of the result itself."""
    losses, norm = right()
    controls = [curve(weights=nudged(seed)) for seed in range(CONTROLS)]
    apart = torch.stack([(c - losses).abs() for c, _ in controls]).amax(0).cummax(0).values
    norms = max(abs(n - norm) for _, n in controls)
    return RATIO * (apart + EPS * losses), RATIO * (norms + EPS * norm)


def deviation(losses: Tensor) -> float:
    """Returns the deviation at the worst step, in units of the tolerance."""
    return float(
        ((losses - torch.tensor(LOSSES, dtype=torch.float64)).abs() / tolerance()[0]).max()
    )


def test_losses_and_first_gradient() -> None:
    losses, norm = right()
    assert deviation(losses) <= 1, losses.tolist()
    assert abs(norm - GRAD_NORM) <= tolerance()[1], norm


def test_a_nudge_that_was_not_a_control_stays_inside() -> None:
    assert deviation(curve(weights=nudged(1000))[0]) <= 1


def tanh_gelu(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op.name != "geglu":
        return dispatch.run(op, args, kwargs)
    a, b = args[0].chunk(2, -1)
    return a * torch.nn.functional.gelu(b, approximate="tanh")


def scale_off_by_a_thousandth(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op.name == "attention":
        args = (*args[:5], args[5] * 1.001, *args[6:])
    return dispatch.run(op, args, kwargs)


@pytest.mark.parametrize("wrong", [tanh_gelu, scale_off_by_a_thousandth])
def test_a_wrong_op_leaves_the_tolerance(wrong: Callable[..., Any]) -> None:
    with dispatch.intercept(wrong):
        assert deviation(curve()[0]) > RATIO


@pytest.mark.parametrize(
    "wrong", ["model.norm_eps=1e-6", "model.embedding_gradient_shrink=0.11", "train.beta2=0.951"]
)
def test_a_wrong_constant_leaves_the_tolerance(wrong: str) -> None:
    assert deviation(curve(override(CONFIG, [wrong]))[0]) > RATIO
