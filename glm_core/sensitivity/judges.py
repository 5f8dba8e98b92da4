"""Judges a mistake of one process as a user would: by conformance, by a small aligned run, or by
resuming a run. Each says by which test it was found, and where."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from glm_core import align
from glm_core.align.explanation import direction_of, finding_to_name
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import Dtype, RunConfig
from glm_core.conformance.case import select
from glm_core.conformance.run import run_case
from glm_core.ops import all_ops
from glm_core.sensitivity import setups
from glm_core.sensitivity.plans import sample
from glm_core.training.checkpoint import FileCheckpoints
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer

EVERY = 0.8
"""share of the parameters from which on every gradient is wrong, not those of a few"""
LOSS_SCALE = 1024.0
"""of float16 runs: low enough that no honest step overflows"""
LIMIT = 20.0
"""of the gradient norm in float16 runs: clipping leaves honest steps alone"""


class Verdict(NamedTuple):
    """What a judge found."""

    by: str = ""
    """the test that convicts; empty: none does"""
    where: str = ""
    why: str = ""


ACQUITTED = Verdict()


# conformance --------------------------------------------------------------------------


def by_conformance(backend: Backend, dtype: Dtype, real: bool = True) -> Verdict:
    """Runs the cases of the ops for which the backend has kernels, the large ones last and forward
    first, until one fails: those in `dtype`, and those that conformance asks in one dtype only.
    `real`: the large shapes too."""
    every = [c for op in backend.kernels for c in select(backend, op=op, real=real)]
    dtypes_of = Counter((c.op.name, c.sample.id, c.mode) for c in every)
    alone = {key for key, count in dtypes_of.items() if count == 1}
    cases = [
        c
        for c in every
        if c.dtype == getattr(torch, dtype) or (c.op.name, c.sample.id, c.mode) in alone
    ]
    for case in sorted(cases, key=lambda c: (c.sample.real or c.sample.large, c.mode == "grad")):
        result = run_case(case, backend)
        if result.outcome == "fail":
            op = case.op.name
            direction = "backward" if case.mode == "grad" else "forward"
            where = f"{op} {direction}" if all_ops()[op].differentiable else op
            return Verdict("conformance", where, f"{case.id}: {result.reason}")
    return ACQUITTED


# an aligned run -----------------------------------------------------------------------


def small_run(dtype: Dtype, steps: int) -> RunConfig:
    """Returns a run of a tiny GLM-130B, with two micro-batches a step."""
    run = sample.config("130b", dtype)
    train = dataclasses.replace(run.train, steps=steps)
    if dtype == "float16":
        train = dataclasses.replace(train, loss_scale=LOSS_SCALE, clip=LIMIT)
    return dataclasses.replace(run, train=train)


def drawn(run: RunConfig) -> setups.Drawn:
    """Returns a sampler over the sequences of a run."""
    return setups.Drawn(sample.Text().next(run.train.steps * run.train.global_batch))


def by_align(
    run: RunConfig,
    calibration: align.Calibration,
    backend: str | Backend = "reference",
    plant: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Verdict:
    """Judges a candidate op by op and by its gradients, then by its curve."""
    chosen = registry.usable(backend) if isinstance(backend, str) else backend
    with plant():
        forced = align.record(run, chosen, calibration=calibration, free_run=False)
    pair = align.compare(calibration.reference, forced)
    if pair.findings:
        worst = finding_to_name(pair.findings)
        op, direction = worst.op, direction_of(worst)
        where = op if direction == "optimizer" else f"{op} {direction}"
        return Verdict("op by op", where, str(worst))
    if pair.max_gradient_ratio > 1:
        where = place("gradient", pair.gradient_excess.max(0), forced.parameters)
        return Verdict("gradients", where, pair.reasons[0])
    with plant():
        free = align.record(run, chosen, calibration=calibration, teacher_forcing=False)
    curve = align.compare(calibration.reference, free)
    if curve.verdict == "diverged":
        by = "update by update" if curve.findings else "curve"
        return Verdict(by, "update", curve.reasons[0])
    return ACQUITTED


def place(kind: str, excess: Any, names: list[str]) -> str:
    """Names the parameter that is furthest outside, or says that all are; `excess`: above 1 is
    outside."""
    wrong = np.asarray(excess) > 1
    if not wrong.any():
        return "loss"
    if wrong.mean() >= EVERY:
        return f"every {kind}"
    return f"{kind} of {names[int(np.argmax(excess))]}"


# resuming -----------------------------------------------------------------------------


def by_resuming(
    run: RunConfig, plant: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Verdict:
    """Saves a run half way and resumes it in a trainer of its own: every part of its state, and
    every later loss, must be the uninterrupted run's to the bit."""
    half = run.train.steps // 2
    with tempfile.TemporaryDirectory() as folder, registry.use("reference"):
        checkpoints = FileCheckpoints(Path(folder), 1)
        first = trainer(run, checkpoints)
        losses = [first.step().loss for _ in range(half)]
        tensors, facts = first.state()
        saved = {k: v.clone() for k, v in tensors.items()}
        path = first.save()
        losses += [first.step().loss for _ in range(half)]
        second = trainer(run, checkpoints)
        torch.manual_seed(1)  # another process has drawn other numbers
        with plant():
            second.restore(checkpoints.open(path))
        found, found_facts = second.state()
        wrong = [k for k, v in saved.items() if not torch.equal(v, found[k])]
        wrong += [k for k, v in facts.items() if v != found_facts[k]]
        if wrong:
            return Verdict("resume", wrong[0], f"not as saved: {', '.join(wrong[:3])}")
        again = [second.step().loss for _ in range(half)]
    if again != losses[half:]:
        return Verdict("resume", "loss", f"{again[0]} for {losses[half]}")
    return ACQUITTED


def trainer(run: RunConfig, checkpoints: FileCheckpoints) -> Trainer:
    """Returns a trainer of the reference backend."""
    return Trainer(run, drawn(run), SingleProcess(run, registry.get("reference")), checkpoints)
