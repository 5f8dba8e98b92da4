"""Decides whether two recorded loss curves are the same, from the traces alone: it needs no torch,
no model and no device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glm_core.align import plan_findings, statistics
from glm_core.align.envelope import Envelope, envelope, error_bound, same_bits
from glm_core.align.overflow import overflow_check
from glm_core.align.trace import Trace
from glm_core.align.trace_format import OpTest
from glm_core.errors import TraceError

Array = NDArray[np.float64]
Verdict = Literal["aligned", "diverged"]
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""the relative error of a result: in float32 `torch.finfo(dtype).eps`, which sums reach; in 16 bits
half of it, what one rounding to nearest does at most"""
MAX_FINDINGS = 20
FALSE_ALARM_RATE = 1e-3
"""the default probability that an honest candidate is called diverged"""
NUM_TESTS = 3
"""envelope, gradients and op by op; each gets an equal share of the rate"""
FEW = 3.0
"""tokens of a step that may have other experts though no disguise of the reference showed one: one
flip moves others after it"""
NOT_FINITE = 1e30
"""stands for infinity and NaN, which JSON does not have"""
WATCHED = 0.1
"""the share of the ops' rate that is for calls judged as they happen, see `watched_run`"""
BETWEEN_UPDATES = ", between two updates"
"""in the projection of a finding about state that changed after an update and before the next"""
AS_IT_HAPPENED = ", as it happened"
"""ends the projection of a finding in the candidate's own run, which no captured call shows"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The outcome of one test of an op result; guilty where its ratio is above 1."""

    op: str
    direction: str
    """forward or backward"""
    layer: str
    """number of the block; empty outside of blocks, and where all calls were pooled"""
    step: int
    """captured step; 0 where all calls were pooled"""
    call: int
    """number of the call in its step; -1 where all calls were pooled"""
    tensor: str
    """see `trace_format.OpResult`"""
    dtype: str
    shape: list[int]
    projection: str
    """see `trace_format.OpTest`"""
    z: float
    """|effect| in standard errors; 0 for sizes and peaks, which have no standard error"""
    effect: float
    """what was measured, relative to the result"""
    benign: float
    """largest effect that honest rounding explains, safety factor included"""
    ratio: float
    """share of what is allowed; above 1 is guilty"""

    def __str__(self) -> str:
        where = f" in layer {self.layer}" if self.layer else ""
        shape = "x".join(map(str, self.shape)) or "scalar"
        z = f", z = {self.z:.1f}" if self.z else ""
        return (
            f"op {self.op} {self.direction}{where}: {self.tensor} [{shape}] {self.dtype}: "
            f"{self.projection} {self.effect:.2e}{z}, benign up to {self.benign:.1e}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The verdict on a candidate."""

    reference: str
    candidate: str
    dtype: str
    verdict: Verdict
    reasons: list[str]
    """why it diverged, one sentence each; empty where aligned"""
    first_step: int | None
    """first step outside the envelope, from 1; None where there is none"""
    max_envelope_ratio: float
    """largest |deviation| / bound of the curve, or the loss scale's; above 1 is outside; 0 without
    a free run"""
    max_gradient_ratio: float
    """largest error of a gradient or the loss / its bound; 0 without teacher forcing"""
    max_op_ratio: float
    """largest effect of an op / its limit; 0 without teacher forcing"""
    findings: list[Finding]
    """the guilty op results, worst first, at most MAX_FINDINGS"""
    false_alarm_rate: float
    """chosen probability that an honest candidate is called diverged"""
    envelope: Envelope | None
    """None without a free run"""
    gradient_ratio: Array
    """[S, P]: error of each parameter's gradient / that of the plain reference"""
    gradient_excess: Array
    """[S, P]: error of each parameter's gradient / its bound"""
    under_plan: str = ""
    """the collective or the parameter that a deviation under a plan points to; empty on one
    process, and where aligned"""
    routing: dict[str, float] = dataclasses.field(default_factory=dict)
    """tokens that routers chose experts for in the captured steps (`rows`), those that rounding was
    `expected` to send elsewhere, those `seen` elsewhere, and those `wrong`: outside their margin;
    empty without experts"""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; the curves are in the traces."""
        skip = ("envelope", "gradient_ratio", "gradient_excess", "findings")
        fields = [f.name for f in dataclasses.fields(self) if f.name not in skip]
        plain = {name: finite(getattr(self, name)) for name in fields}
        return plain | {"findings": [dataclasses.asdict(f) for f in self.findings]}


def finite(value: Any) -> Any:
    """Returns NOT_FINITE for infinity and NaN, any other value unchanged."""
    return NOT_FINITE if isinstance(value, float) and not math.isfinite(value) else value


@np.errstate(all="ignore")  # what overflows is infinite, and what is NaN counts as infinite
def compare(
    reference: Trace, candidate: Trace, *, false_alarm_rate: float = FALSE_ALARM_RATE
) -> Pair:
    """Returns the verdict on `candidate`. The reference's trace has the control runs; the candidate
    was recorded with the same config, data and weights, perhaps on another machine. Two exact runs
    (`train.exact`), of which none is the reference, must have the same losses to the bit; they need
    no controls. The false-alarm
    rate is split evenly between envelope, gradients and ops, and inside each over all steps,
    parameters and tests. Raises TraceError where the two cannot be compared."""
    require_comparable(reference, candidate)
    rate = false_alarm_rate / NUM_TESTS
    curve = None
    traces = (reference, candidate)
    exact = all(t.config["train"].get("exact") and t.backend != "reference" for t in traces)
    if candidate.loss.size and exact:
        curve = same_bits(reference.loss, candidate.loss)
    elif candidate.loss.size:
        curve = envelope(reference.loss, reference.control_loss, candidate.loss, rate)
    moved_excess = moved_check(candidate, rate)
    # where experts are chosen, their choice takes a third of the gradients' share of the rate
    shared = rate * 2 / 3 if moved_excess.size else rate
    ratio, excess, loss_excess = gradient_check(candidate, shared)
    captured_rate = (1 - WATCHED) * rate
    tested = findings(candidate.tests, candidate.test_values, candidate.num_tests, captured_rate)
    guilty = [f for f in tested if f.ratio > 1]
    overflow_ratio, overflow_reason = overflow_check(reference, candidate)
    envelope_ratio = max(float(curve.ratio.max()) if curve else 0.0, overflow_ratio)
    planned = plan_findings.worst(candidate)
    plan_ratios = np.array([plan_findings.ratio_of(test) for test in planned.values()])
    of_gradients = (excess, loss_excess, moved_excess, plan_ratios)
    gradient_ratio = float(max(x.max(initial=0.0) for x in of_gradients))
    reasons = [
        *_envelope_reason(curve, exact),
        *overflow_reason,
        *_gradient_reason(candidate, excess, loss_excess),
        *_moved_reason(candidate, moved_excess),
        *plan_findings.reasons(planned),
        *(str(f) for f in guilty[:3]),
    ]
    return Pair(
        reference=reference.backend,
        candidate=candidate.backend,
        dtype=candidate.dtype,
        verdict="diverged" if reasons else "aligned",
        reasons=reasons,
        first_step=curve.first_step if curve else None,
        max_envelope_ratio=envelope_ratio,
        max_gradient_ratio=gradient_ratio,
        max_op_ratio=max((f.ratio for f in tested), default=0.0),
        findings=guilty[:MAX_FINDINGS],
        false_alarm_rate=false_alarm_rate,
        envelope=curve,
        gradient_ratio=ratio,
        gradient_excess=excess,
        under_plan=plan_findings.place(reference, candidate, excess, loss_excess)
        if reasons
        else "",
        routing=_sums(candidate),
    )


def require_comparable(reference: Trace, candidate: Trace) -> None:
    """Raises a TraceError that names the first fact in which the two traces differ."""
    for field in ("dtype", "initial_weights", "data_order"):
        own, other = getattr(reference, field), getattr(candidate, field)
        if own != other:
            raise TraceError(
                f"traces cannot be compared: {field} is {own!r:.70} in the reference, "
                f"{other!r:.70} in the candidate; record both with the same config, seed and data"
            )
    if candidate.loss.size not in (0, reference.loss.size):
        raise TraceError(
            f"traces cannot be compared: {reference.loss.size} steps in the reference and "
            f"{candidate.loss.size} in the candidate; record both with the same train.steps"
        )
    if not candidate.loss.size and not candidate.capture_steps:
        raise TraceError(
            f"trace of {candidate.backend}: it holds neither a free run nor teacher forcing; "
            "record one of them"
        )


def gradient_check(trace: Trace, rate: float) -> tuple[Array, Array, Array]:
    """Returns each gradient's error divided by the plain reference's [S, P], each gradient's error
    divided by its bound [S, P], and the loss's error divided by its bound [S]. Gradients and loss
    take half the rate each."""
    if not trace.capture_steps:
        empty = np.zeros((0, len(trace.parameters)))
        return empty, empty, np.zeros(0)
    errors, losses = trace.gradient_error, trace.loss_error
    if len(errors) < 4 or not (np.isfinite(errors[1:]).all() and np.isfinite(losses[1:]).all()):
        raise TraceError(
            f"trace of {trace.backend!r}: the reference's gradients in it are too few or not "
            "finite; record again with a smaller train.lr, in float16 also train.loss_scale"
        )
    ratio = errors[0] / np.maximum(errors[1], 1e-30)
    excess = errors[0] / error_bound(errors[2:], gradient_floor(trace), rate / 2)
    loss_floor = EPS["float32"] * tokens_of(trace) ** 0.5
    loss_excess = losses[0] / error_bound(losses[2:], loss_floor, rate / 2, numbers=True)
    excess, loss_excess = (np.where(np.isnan(x), np.inf, x) for x in (excess, loss_excess))
    return ratio, excess, loss_excess


def tokens_of(trace: Trace) -> int:
    """Returns the tokens of a step."""
    tokens: int = trace.config["data"]["length"] * trace.config["train"]["global_batch"]
    return tokens


def gradient_floor(trace: Trace) -> float:
    """Returns the least error that every gradient may have: one unit of the dtype, or that of a
    naive sum over all tokens."""
    return max(EPS[trace.dtype], EPS["float32"] * tokens_of(trace) ** 0.5)


def moved_check(trace: Trace, rate: float) -> Array:
    """Returns the tokens that have other experts than in float64, over their bound [S]; empty where
    no disguise was counted. They take a third of the rate."""
    moved = trace.moved_tokens
    if len(moved) < 4 or not trace.config["model"]["num_experts"]:
        return np.zeros(0)
    return moved[0] / error_bound(moved[2:], FEW, rate / 3)


def _sums(trace: Trace) -> dict[str, float]:
    calls = trace.routing
    sums = {
        "rows": sum(r["rows"] for r in calls),
        "expected": sum(r["expected"] for r in calls),
        "seen": sum(r["seen"] for r in calls),
        "wrong": sum(r["wrong"] for r in calls),
    }
    return sums if calls else {}


def _moved_reason(trace: Trace, excess: Array) -> list[str]:
    if not (excess.size and excess.max() > 1):
        return []
    at = int(np.argmax(excess))
    return [
        f"step {trace.capture_steps[at]}: {trace.moved_tokens[0, at]:.0f} tokens of a layer have "
        f"other experts than in float64, {excess[at]:.3g} times the bound"
    ]


def findings(tests: list[OpTest], values: Array, num_tests: int, rate: float) -> list[Finding]:
    """Returns the outcome of every test, the largest ratio first. `values` [T, 3] are the effects,
    standard errors and limits of `tests`, which were chosen from `num_tests`; `rate` is the
    probability that an honest candidate has any guilty one."""
    z = statistics.critical_z(rate, num_tests)
    outcomes = []
    ratios = statistics.ratios_of([test["projection"] for test in tests], values, z).tolist()
    for test, (effect, error, limit), ratio in zip(tests, values, ratios, strict=True):
        outcomes.append(
            Finding(
                **test,
                z=float(abs(effect) / error) if error > 0 else 0.0,
                effect=float(effect),
                benign=float(limit),
                ratio=ratio,
            )
        )
    return sorted(outcomes, key=lambda f: -f.ratio)


def _envelope_reason(curve: Envelope | None, exact: bool) -> list[str]:
    if curve is None or curve.first_step is None:
        return []
    n = curve.first_step
    if not math.isfinite(curve.deviation[n - 1]):
        return [f"step {n}: the loss is not finite, or the run broke off"]
    return [
        f"step {n}: the loss deviates by {curve.deviation[n - 1]:+.2e}, "
        + (
            "exact runs by nothing"
            if exact
            else f"honest rounding by at most {curve.bound[n - 1]:.1e}"
        )
    ]


def _gradient_reason(trace: Trace, excess: Array, loss_excess: Array) -> list[str]:
    reasons = []
    if excess.size and excess.max() > 1:
        s, p = divmod(int(np.argmax(excess)), excess.shape[1])
        reasons.append(
            f"step {trace.capture_steps[s]}: the gradient of {trace.parameters[p]} is off by "
            f"{trace.gradient_error[0, s, p]:.2e} of its norm, {excess[s, p]:.3g} times the bound"
        )
    if loss_excess.size and loss_excess.max() > 1:
        at = int(np.argmax(loss_excess))
        reasons.append(
            f"step {trace.capture_steps[at]}: on the same weights the loss is off by "
            f"{trace.loss_error[0, at]:.2e}, {loss_excess[at]:.3g} times the bound"
        )
    return reasons
