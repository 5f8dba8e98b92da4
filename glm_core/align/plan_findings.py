"""Says which of a plan's collectives, or which parameter, a planned run's deviation points to.
Needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glm_core.align.trace import Trace
from glm_core.align.trace_format import PlanTest
from glm_core.distributed.plan import Plan, parse, partial, replicated
from glm_core.errors import ConfigError, TraceError

Array = NDArray[np.float64]
EVERY = 0.8
"""share of the parameters from which on every gradient is wrong, not those of a few"""
FORWARD = {
    "tp": "a sum of the tp ranks' products, a matrix that is cut otherwise, or the softmax over "
    "the ranks' rows of the vocabulary",
    "pp": "what one stage hands to the next, or counts of all layers (DeepNorm's alpha)",
    "ep": "the rows of tokens that travel to the experts and back",
    "zero": "weights that are gathered too late or wrong",
    "dp": "which rows each dp rank takes, the weights of their tokens, or the sum of their losses",
}
"""by axis of a plan: what a wrong loss on right weights points to"""


TESTS = {
    "norm": "norm of all gradients",
    "copies": "copies of a gradient on several ranks",
    "update": "update of each rank's part",
}
"""by test: what is compared with one process"""
HEAD = ("under the plan", "parameter", "step", "off by", "allowed", "share")
"""of `rows`"""


def worst(trace: Trace) -> dict[str, PlanTest]:
    """Returns for each test of what a plan does with its gradients the step furthest outside, by
    the test's name; empty on one process. Their limits are roundings of float32 that nothing
    honest exceeds, so they take no part of the false-alarm rate."""
    furthest: dict[str, PlanTest] = {}
    for test in trace.plan_tests:
        name = test["test"]
        if name not in furthest or ratio_of(test) > ratio_of(furthest[name]):
            furthest[name] = test
    return furthest


def ratio_of(test: PlanTest) -> float:
    """Returns an error over its limit; infinite where it is not finite."""
    ratio = test["measured"] / max(test["limit"], 1e-300)
    return ratio if math.isfinite(ratio) else math.inf


def place(reference: Trace, candidate: Trace, excess: Array, loss_excess: Array) -> str:
    """Returns what a planned run's deviation points to: the loss first, since a wrong forward pass
    spoils the gradients too, then the gradients, and what is made of them."""
    if "plan" not in candidate.environment:
        return ""
    try:
        plan = parse(str(candidate.environment["plan"]))
    except ConfigError as error:
        raise TraceError(f"trace of {candidate.backend}: {error}") from None
    guilty = {name: t for name, t in worst(candidate).items() if ratio_of(t) > 1}
    if loss_excess.max(initial=0.0) > 1:
        return of_loss(plan)
    if excess.max(initial=0.0) > 1:
        own, right = candidate.gradient_norm, reference.gradient_norm
        factor = own / np.maximum(right if right.shape == own.shape else own, 1e-300)
        names, copies = candidate.parameters, guilty.get("copies")
        return of_gradients(plan, names, excess, factor, copies)
    if guilty:
        return of_test(plan, next(iter(guilty.values())))
    return "what is carried from one step to the next: no captured step shows it"


def reasons(planned: dict[str, PlanTest]) -> list[str]:
    """Returns a sentence for each of `worst`'s tests that is guilty."""
    return [_reason(test) for test in planned.values() if ratio_of(test) > 1]


def _reason(test: PlanTest) -> str:
    what = {
        "norm": "the norm of all gradients",
        "copies": f"a copy of the gradient of {test['parameter']}",
        "update": f"the update of {test['parameter']}",
    }.get(test["test"], test["test"])
    return (
        f"step {test['step']}: {what} is off by {test['measured']:.2e}, rounding explains "
        f"{test['limit']:.1e}"
    )


def axes(plan: Plan) -> list[str]:
    """Returns the axes that a plan uses, in the order of FORWARD."""
    used = {name: getattr(plan, name) > (0 if name == "zero" else 1) for name in FORWARD}
    return [name for name, here in used.items() if here]


def of_loss(plan: Plan) -> str:
    """Names what a wrong loss points to."""
    return "the forward pass: " + "; or ".join(FORWARD[axis] for axis in axes(plan))


def of_gradients(
    plan: Plan, parameters: Sequence[str], excess: Array, factor: Array, copies: PlanTest | None
) -> str:
    """Names the sum of gradients that the wrong ones have in common, or else the furthest outside.
    excess, factor [S, P]: each error over its bound, and each norm over the reference's. copies:
    the test of copies, where it is guilty."""
    step = int(np.argmax(excess.max(1)))
    wrong = [n for n, x in zip(parameters, excess[step], strict=True) if x > 1]
    named = _common(plan, parameters, wrong)
    if not named:
        worst = parameters[int(np.argmax(excess[step]))]
        named = f"the gradient of {worst}"
        named += f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
    factors = factor[step][excess[step] > 1]
    middle = float(np.median(factors))
    same = abs(middle - 1) > 0.05 and np.abs(factors - middle).max() < 0.05 * abs(middle)
    scaled = f"; they are {middle:.2f} times what they should be" if same else ""
    apart = f"; copies on {_ranks(copies)} differ: no sum makes them equal" if copies else ""
    return named + scaled + apart


def _common(plan: Plan, parameters: Sequence[str], wrong: Sequence[str]) -> str:
    """Returns the collective whose gradients are wrong, all of them and no others; or ""."""
    how = "reduce-scatter" if plan.zero else "all-reduce"
    if len(wrong) >= EVERY * len(parameters):
        causes = [f"the {how} over dp"] if plan.dp > 1 else []
        if plan.tp * plan.pp * plan.ep > 1:
            causes.append("what is sent back in the backward pass")
        return f"every gradient: {', or '.join(causes)}"
    groups = {
        "gradients of experts: their sum over the dp ranks that hold the same ones, or what is "
        "sent back through the exchange of rows": plan.ep > 1 and (lambda n: ".experts_" in n),
        "gradients of what every tp rank holds whole (norms, biases): their all-reduce over tp": (
            plan.sp and replicated
        ),
        "gradients of which every tp rank has a share (norms of heads, routers, latents): their "
        "all-reduce over tp": plan.tp > 1 and partial,
        "the gradient of the embedding: its all-reduce over the first and the last stage": (
            plan.pp > 1 and (lambda n: n == "embedding")
        ),
    }
    for name, belongs in groups.items():
        if belongs and wrong and all(map(belongs, wrong)):
            return name
    return ""


def of_test(plan: Plan, test: PlanTest) -> str:
    """Names what a guilty test points to."""
    if test["test"] == "norm":
        shared = "dp" if plan.zero else "ep"
        used = [axis for axis in ("tp", "pp", shared) if getattr(plan, axis) > 1]
        over_axes = f"the all-reduce over {' and '.join(used)}, or " if used else ""
        return f"the gradient norm: {over_axes}what it counts twice"
    where = f"{test['parameter']} on {_ranks(test)}"
    others = f", and of {test['outside'] - 1} other parameters" if test["outside"] > 1 else ""
    if test["test"] == "copies":
        return f"copies of the gradient of {where}{others}: they should be equal"
    return f"the update of {where}{others}"


def _ranks(test: PlanTest) -> str:
    return f"rank{'s'[: len(test['ranks']) - 1]} {' and '.join(map(str, test['ranks']))}"


def rows(candidate: Trace) -> list[tuple[str, ...]]:
    """Returns a row of the report for each test, its step furthest outside."""
    return [
        (
            TESTS.get(name, name),
            t["parameter"],
            str(t["step"]),
            f"{t['measured']:.1e}",
            f"{t['limit']:.1e}",
            f"{ratio_of(t):.3f}",
        )
        for name, t in worst(candidate).items()
    ]
