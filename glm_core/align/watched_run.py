"""Judges every op call of a candidate's own run as it happens. A fault that happens once does not
show when captured calls are replayed. Each result is first compared with the reference's, in the
working dtype; only a call that is further off than honest kernels is compared with float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from glm_core.align import teacher_forcing
from glm_core.align.capture import Call, Capture, capture
from glm_core.align.replay import Results, flat, replay, with_change
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.verdict import (
    AS_IT_HAPPENED,
    FALSE_ALARM_RATE,
    NUM_TESTS,
    WATCHED,
    Finding,
    findings,
)
from glm_core.align.worst_tests import with_tests, worst_tests
from glm_core.dispatch import Op

RATE = WATCHED * FALSE_ALARM_RATE / NUM_TESTS
"""the share of the verdict's false-alarm rate that is for calls judged as they happen"""


class ResultCapture(Capture):
    """Captures the calls of one step together with their results and gradients."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.results: list[Results] = []

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The interceptor: runs the call and keeps its results."""
        results: Results = {}
        self.results.append(results)
        named = op.named(args, kwargs)
        for name in op.differentiable:
            if isinstance(named.get(name), Tensor) and named[name].requires_grad:
                named[name] = named[name].view_as(named[name])  # its gradient is this call's alone
                named[name].register_hook(_keep(results, f"d_{name}"))
        out = super().__call__(op, (), named)
        outputs = out if isinstance(out, tuple) else () if out is None else (out,)
        for i, y in enumerate(outputs):
            results[f"y{i}" if len(outputs) > 1 else "y"] = cpu_copy(y)
        results.update({n: cpu_copy(named[n]) for n in op.mutates if named.get(n) is not None})
        return out

    def on_cpu(self) -> list[Call]:
        """Returns the calls with all their tensors on the CPU."""
        move = lambda x: x.cpu() if isinstance(x, Tensor) else x  # noqa: E731
        return [
            dataclasses.replace(
                c, args=tree_map(move, c.args), output_gradients=tree_map(move, c.output_gradients)
            )
            for c in self.calls
        ]

    def results_of(self, call: Call) -> Results:
        """Returns what a call of `on_cpu` gave."""
        return with_change(call, self.results[call.index])


def _keep(results: Results, name: str) -> Any:
    def keep(gradient: Tensor) -> None:
        results[name] = cpu_copy(gradient)

    return keep


def cpu_copy(value: Any) -> Tensor:
    """Returns a copy on the CPU; a list of tensors becomes one flat tensor."""
    whole = flat(value).detach().cpu()
    return whole.clone() if isinstance(value, Tensor) else whole  # the flat one is a copy


class Watch:
    """Watches a candidate's run. After the first step with guilty calls it looks no further."""

    def __init__(
        self, limits: dict[Key, float], dtype: torch.dtype, steps: int, stop: bool = False
    ) -> None:
        """limits: the benign range of the captured steps; steps: of the whole run; stop: whether
        the run ends with the first guilty step."""
        self.limits, self.dtype, self.steps, self.stop = limits, dtype, steps, stop
        self.captured: ResultCapture | None = None
        """the calls of the step that runs"""
        self.guilty: list[Finding] = []
        """of single calls in the last step, the furthest outside first"""
        self.saturated: tuple[Call, str] | None = None
        """the first call and direction with finite numbers where infinity is correct"""

    @property
    def ends_run(self) -> bool:
        """Says whether the run has shown what it was watched for."""
        return self.stop and bool(self.guilty)

    @contextmanager
    def step(self, model: nn.Module, step: int) -> Iterator[None]:
        """Captures the calls that are made inside the block."""
        self.captured = None if self.guilty else ResultCapture(step)
        with capture(model, step, self.captured) if self.captured else nullcontext():
            yield

    def judge(self) -> None:
        """Judges the calls of the step that ended."""
        if self.captured is None:
            return
        calls = [c for c in self.captured.on_cpu() if self.suspicious(c)]
        if not calls:
            return
        cases = list(teacher_forcing.cases(calls))
        self.saturated = self.saturated or first_saturated(self.captured, cases)
        tests = self.steps * len(self.captured.calls) / len(calls)
        self.guilty = judge_step(self.captured, cases, self.limits, self.dtype, tests)

    def suspicious(self, call: Call) -> bool:
        """Is a result of the call further from the reference's than an honest kernel's may be from
        the correct one? Size and peak of the difference are looked at."""
        assert self.captured is not None
        results = self.captured.results_of(call)
        terms = Case(call, {}, {}, {}).terms
        for name, correct in replay(call, call.op.reference).items():
            if name not in results:
                continue
            if results[name].shape != correct.shape:
                return True
            if results[name].dtype == correct.dtype and torch.equal(results[name], correct):
                continue  # as where the candidate has no kernel
            if not results[name].is_floating_point() and (results[name] != correct).any():
                return True  # a choice, an order or counts: all or nothing
            y = correct.to(torch.promote_types(correct.dtype, torch.float32))
            off = results[name].to(y.dtype) - y
            for statistic, norm in (("size", _length), ("peak", _largest)):
                key = Key(call.op.name, name, "all", statistic, pooled=False)
                limit = teacher_forcing.limit(self.limits, key, correct.dtype, terms)
                if y.numel() and not norm(off) <= limit * norm(y):  # NaN, too, is suspicious
                    return True
        return False

    def added_to(self, taught: dict[str, Any]) -> dict[str, Any]:
        """Returns a trace's fields of teacher forcing with the guilty calls of this run added."""
        names = [field.name for field in dataclasses.fields(Finding)]
        left_out = ("z", "effect", "benign", "ratio")
        tests = [{n: getattr(f, n) for n in names if n not in left_out} for f in self.guilty]
        for test in tests:
            test["projection"] += AS_IT_HAPPENED
        values = [[f.effect, f.effect / f.z if f.z else 0.0, f.benign] for f in self.guilty]
        return with_tests(taught, tests, values)


def _length(x: Tensor) -> Tensor:
    """Returns the root of the sum of squares; torch's own norm takes seven times as long."""
    v = x.flatten()
    return torch.dot(v, v).sqrt()


def _largest(x: Tensor) -> Tensor:
    """Returns the largest absolute value, NaN where there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def first_saturated(captured: ResultCapture, cases: list[Case]) -> tuple[Call, str] | None:
    """Returns the first call, and its direction, that gave finite numbers where the correct result
    is infinite."""
    for case in cases:
        results = captured.results_of(case.call)
        for name in case.overflowed:
            if name in results and results[name].isfinite().all():
                return case.call, "backward" if name.startswith("d_") else "forward"
    return None


def judge_step(
    captured: ResultCapture,
    cases: list[Case],
    limits: dict[Key, float],
    dtype: torch.dtype,
    times: float,
) -> list[Finding]:
    """Returns the guilty findings of single calls in one step, whose calls are `cases`. In all,
    `times` as many tests are made as those of these calls. `limits` is the benign range of the
    captured steps; for ops that leave it, it is widened by the range measured in this very step."""
    measured, _ = teacher_forcing.measure(cases, captured.results_of)

    def outside(limits: dict[Key, float]) -> list[Finding]:
        tests, values = worst_tests(measured, cases, limits)
        tested = findings(tests, values, round(measured.count() * times), RATE)
        return [f for f in tested if f.ratio > 1 and f.call >= 0]

    suspects = {f.op for f in outside(limits)}
    if not suspects:
        return []
    own = teacher_forcing.benign_limits([c for c in cases if c.call.op.name in suspects], dtype)
    return outside(limits | {k: max(v, limits.get(k, 0.0)) for k, v in own.items()})
