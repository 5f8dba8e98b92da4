"""Overflow in float16: a step that overflows is not judged, another is captured in its place; a
device that saturates overflows too seldom, and that is the finding."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import markov
import numpy as np
import pytest
import torch
from torch import Tensor

from glm_core import align, ops
from glm_core.align.gradients import load_snapshot
from glm_core.align.overflow import overflow_check
from glm_core.align.trace import Trace, load
from glm_core.align.training import Curve, Run, free_run
from glm_core.config import RunConfig
from glm_core.errors import TraceError

GOLDEN = Path(__file__).parent / "golden" / "reference-float32.trace"


def config(loss_scale: float = 2.0**23, steps: int = 8) -> RunConfig:
    base = markov.config("float16", steps=steps, micro_batch=1)
    train = {"loss_scale": loss_scale, "loss_scale_hysteresis": 1, "global_batch": 1}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, num_layers=1, tied_head=False),
        train=dataclasses.replace(base.train, **train),
    )


@functools.cache
def curve() -> Curve:
    """The reference's run, in which step 2 was to be captured."""
    return free_run(Run(config(), markov.Markov(), "reference"), (2,))


def trace(of: Curve) -> Trace:
    """A trace with this run's loss scales."""
    none = of.loss_scale[None][:0]
    own = {"loss_scale": of.loss_scale, "skipped": of.skipped}
    controls = {"control_loss_scale": none, "control_skipped": none}
    return dataclasses.replace(load(GOLDEN), **own, **controls)


class Saturate(torch.autograd.Function):
    """Passes a value on; gradients beyond float16's largest number become that number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].float().nan_to_num(0.0).clamp(-65504, 65504).to(gradients[0].dtype)


def saturating(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        named = op.named(args, kwargs)
        for name in op.differentiable:
            if isinstance(named.get(name), Tensor) and named[name].requires_grad:
                named[name] = Saturate.apply(named[name])  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return op.reference(**named)

    return kernel


def test_the_next_step_without_overflow_is_captured_with_its_loss_scale() -> None:
    seen = curve()
    good = np.flatnonzero(seen.skipped == 0) + 1
    assert good[0] > 2
    [snapshot] = seen.snapshots
    assert snapshot.step == good[0]
    assert snapshot.loss_scale == seen.loss_scale[good[0] - 1] < 2.0**23
    run = load_snapshot(Run(config(), markov.Markov(), "reference"), snapshot)
    _, gradients = run.gradients(snapshot.batches)
    assert all(g.isfinite().all() for g in gradients.values())


def test_a_run_in_which_every_step_overflows_is_refused() -> None:
    with pytest.raises(TraceError, match=r"2 of 2 steps overflowed.*smaller train.loss_scale"):
        align.calibrate(config(2.0**40, 2), sampler=markov.Markov, controls=0)


def test_a_device_that_saturates_is_found_by_its_loss_scale(tmp_path: Path) -> None:
    differentiable = [op for op in ops.all_ops().values() if op.differentiable]
    wrong = markov.backend(**{op.name: saturating(op) for op in differentiable})
    saturated = free_run(Run(config(), markov.Markov(), wrong))
    assert saturated.skipped.sum() == 0
    trace(saturated).save(tmp_path / "wrong.trace")
    ratio, reasons = overflow_check(trace(curve()), load(tmp_path / "wrong.trace"))
    assert ratio > 1
    assert reasons[0].startswith("gradients overflowed at 0 steps, in the reference at ")


@pytest.mark.parametrize(
    ("doublings", "skips", "ratio"), [(0, 0, 0.0), (1, 0, 1.0), (0, 2, 1.0), (2, 0, 2.0)]
)
def test_an_honest_run_is_a_doubling_or_two_skips_away(
    doublings: int, skips: int, ratio: float
) -> None:
    reference = trace(curve())
    scale, skipped = reference.loss_scale.copy(), reference.skipped.copy()
    scale[-1] *= 2.0**doublings
    skipped[np.flatnonzero(skipped)[:skips]] = 0
    other = dataclasses.replace(reference, loss_scale=scale, skipped=skipped)
    found, reasons = overflow_check(reference, other)
    assert found == pytest.approx(ratio)
    assert bool(reasons) == (ratio > 1)
    control = {"control_loss_scale": scale[None], "control_skipped": skipped[None]}
    assert overflow_check(dataclasses.replace(reference, **control), other)[0] <= ratio / 1.5


def test_traces_without_loss_scales_are_not_compared_by_them() -> None:
    assert overflow_check(load(GOLDEN), trace(curve())) == (0.0, [])
    assert overflow_check(trace(curve()), load(GOLDEN)) == (0.0, [])
