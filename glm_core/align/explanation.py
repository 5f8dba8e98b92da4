"""Puts a verdict into words: one sentence first, and for what diverged where it is, what an honest
kernel would show, the command that reruns it, and what such a deviation usually is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm_core.align.verdict import (
    AS_IT_HAPPENED,
    BETWEEN_UPDATES,
    NOT_FINITE,
    Finding,
    Pair,
)

if TYPE_CHECKING:
    from glm_core.align.trace import Trace

HONEST = "what honest rounding does"
MAX_EXHIBITS = 3
MEASURED = {
    "scale": "too {large} by a common factor: {amount} of the result",
    "offset": "shifted {up} by a constant: {amount} of the result",
    "sign": "rounded {up} more often than {down}: by {amount} of the roundings that differ",
    "lean": "rounded {up} more often than {down}: by {amount} of the many roundings that differ",
    "size": "off by {amount} of the result",
    "peak": "one element is off by {amount} of the largest",
    "differ": "other whole numbers than the reference's: {amount} of them",
}
"""by statistic: what was seen"""
USUALLY = {
    "scale": "a wrong factor: a scale, a mean over the wrong count, a constant rounded too early, "
    "truncation in place of rounding",
    "offset": "a wrong constant: an epsilon, a bias that is lost or added twice, an approximation "
    "that leans to one side",
    "sign": "a formula that is almost right: an approximate function, an epsilon in the wrong "
    "place, truncation",
    "lean": "a formula that is almost right, or an intermediate that is always rounded to one side",
    "size": "sums in low precision, rows that are dropped or doubled, stale values",
    "peak": "a single wrong element: the edge of a tile, an index past the end, a race",
    "differ": "another order of sorting, another tie, or a choice outside its margin",
    "row": "a mask, padding, or the rows left over after the last whole tile",
    "position": "rotary tables, a causal offset, or a cache",
    "head": "the order of grouped heads, or one head's scale",
    "channel": "the columns left over after the last whole vector, or a layout",
    "bin": "something that depends on the value: an approximate function, saturation, an epsilon",
    "optimizer": "weight decay, bias correction, or where the epsilon stands",
    "carried": "masters or moments that are kept in a lower precision, lost, or written by "
    "something other than the update",
    "gradients": "something between the ops: a mask, the weights of the loss, accumulation over "
    "micro-batches, an op that needs the calls before it",
    "plan": "a collective: gradients that are not summed or averaged twice, the wrong rank's "
    "rows, a norm of one shard, tied weights of two stages that are not added",
    "curve": "an update of the weights, or a fault that struck between the captured steps",
}
"""by statistic, group of elements or test: what such a deviation usually is"""
PLAN_ALONE = (
    "with --backends reference the same command judges the plan alone, without --plan the backend "
    "alone"
)
KINDS = {
    "scale": ("scale", "formula"),
    "offset": ("eps", "formula"),
    "sign": ("formula", "eps", "rounding"),
    "lean": ("eps", "rounding", "formula"),
    "size": ("rows", "stale", "dtype", "mask"),
    "peak": ("rows", "rare shape", "stale"),
    "differ": ("formula", "rows"),
}
"""by statistic: the catalogue's kinds of fault that show it first"""


def headline(pairs: Sequence[Pair]) -> str:
    """Returns the outcome of all comparisons in one sentence."""
    if not pairs:
        return "Nothing was judged: the reference ran alone."
    diverged = [p for p in pairs if p.verdict == "diverged"]
    worst = max(diverged or pairs, key=stated_ratio)
    if len(pairs) == 1:
        return f"{sentence(worst)}."
    if diverged:
        return f"{len(diverged)} of {len(pairs)} comparisons diverged. {sentence(worst)}."
    return f"All {len(pairs)} comparisons are aligned. The nearest to the limit: {sentence(worst)}."


def sentence(pair: Pair) -> str:
    """Returns the verdict on one candidate in one sentence, without its full stop."""
    start = f"{pair.dtype} on {pair.candidate}: {pair.verdict}{_routing(pair)}"
    if pair.verdict == "aligned":
        same = pair.envelope is not None and not pair.envelope.deviation.any()
        curve = "; the curves are identical, every loss to the bit" if same else ""
        largest = f"the largest deviation is {times(stated_ratio(pair))} of {HONEST}"
        return f"{start}{curve}; {largest}{_left_out(pair)}"
    ratio, subject = stated_ratio(pair), _subject(pair)
    if not ratio < NOT_FINITE:
        return f"{start}; {subject} is infinite, NaN, or so far off that its error overflows"
    return f"{start}; {subject} deviates {times(ratio)} times as far as honest rounding does"


def _left_out(pair: Pair) -> str:
    """Returns which test was not made, as a part of the sentence; empty where all were."""
    if pair.envelope is None:
        return "; the curve was not judged"
    return "" if pair.gradient_excess.size else "; gradients and ops were not judged"


def _routing(pair: Pair) -> str:
    """Returns what the routers chose, as a part of the sentence; empty without experts."""
    if not (r := pair.routing):
        return ""
    margin = "each inside its margin" if not r["wrong"] else f"{r['wrong']:.0f} outside the margin"
    flips = f"{r['seen']:.0f} of {r['rows']:,.0f} choices of experts differ from float64's"
    return f"; {flips} ({r['expected']:.2g} expected), " + (margin if r["seen"] else "none wrong")


def shares(pair: Pair, candidate: Trace) -> list[float | None]:
    """Returns the largest ratios of curve, gradients and ops; None for what is not judged."""
    judged = (pair.envelope is not None, pair.gradient_excess.size, candidate.num_tests)
    ratios = (pair.max_envelope_ratio, pair.max_gradient_ratio, pair.max_op_ratio)
    return [ratio if here else None for ratio, here in zip(ratios, judged, strict=True)]


def stated_ratio(pair: Pair) -> float:
    """Returns the ratio of what the sentence names: the named finding of an op, else the gradients,
    else the curve; where nothing is outside, the largest of all tests."""
    if pair.findings:
        return finding_to_name(pair.findings).ratio
    if pair.max_gradient_ratio > 1:
        return pair.max_gradient_ratio
    return max(pair.max_envelope_ratio, pair.max_gradient_ratio, pair.max_op_ratio)


def _subject(pair: Pair) -> str:
    if pair.under_plan:
        of_curve = pair.max_gradient_ratio <= 1 and pair.first_step
        what = f"the loss, from step {pair.first_step} on," if of_curve else "a captured step"
        return f"{what} ({pair.under_plan})"
    if pair.findings:
        f = finding_to_name(pair.findings)
        if BETWEEN_UPDATES in f.projection:
            return "no op, but the optimizer's state between two updates,"
        return f"op {f.op} {direction_of(f)}" + (f" in layer {f.layer}" if f.layer else "")
    if pair.max_gradient_ratio > 1:
        return "every op is right, but a whole step's gradients or its loss"
    if pair.first_step:
        return f"the loss, from step {pair.first_step} on,"
    return "the loss scale"


def amount(share: float) -> str:
    """Returns the size of a share in words: `1 part in 1,000 (1.0e-03)`."""
    size = abs(share)
    if not size < 1e9:
        return "no finite share"
    return f"1 part in {1 / size:,.0f} ({size:.1e})" if 0 < size < 0.5 else f"{size:.2g} times"


def times(ratio: float) -> str:
    """Returns a ratio with two decimals, a large one with none."""
    if ratio < 100:
        return f"{max(ratio, 0.0):.2f}"
    return f"{ratio:,.0f}" if ratio < 1e9 else f"{ratio:.1e}"


def finding_to_name(guilty: list[Finding]) -> Finding:
    """Returns the finding to name, for the op furthest outside. A forward finding comes before a
    backward one, since a wrong forward spoils the backward too; a finding in a single call comes
    before one that all calls show together."""
    same_op = [f for f in guilty if f.op == guilty[0].op]
    candidates = [f for f in same_op if direction_of(f) != "backward"] or same_op
    return next((f for f in candidates if f.call >= 0), candidates[0])


def direction_of(finding: Finding) -> str:
    """Returns forward, backward, or `optimizer` for an op of the update, which has no gradient."""
    from glm_core.ops import all_ops  # needs torch, which comparing two traces does not

    return finding.direction if all_ops()[finding.op].differentiable else "optimizer"


def details(
    pair: Pair, trace: Trace, options: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """Returns what a reader needs who has to repair a diverged candidate, as pairs of label and
    text. `trace` is the candidate's, `options` the command line's (default: the trace's config)."""
    named = finding_to_name(pair.findings) if pair.findings else None
    rows = _of_op(named) if named else _of_run(pair)
    rows.insert(-1, ("rerun", rerun(pair, trace, options)))
    if pair.under_plan and trace.environment.get("one process") != pair.reference:
        rows.insert(-1, ("plan or backend", PLAN_ALONE))
    outside_ops = named is not None and BETWEEN_UPDATES in named.projection
    if named and not outside_ops and (examples := exhibits(named)):
        rows.append(("known examples", "; ".join(examples)))
    return rows


def _of_op(f: Finding) -> list[tuple[str, str]]:
    shape = "x".join(map(str, f.shape)) or "scalar"
    layer = f"layer {f.layer}, " if f.layer else ""
    where = f"{layer}step {f.step}" if f.call >= 0 else "all its calls together"
    if f.projection.endswith(AS_IT_HAPPENED):
        where += " of its own run, as it happened"
    statistic, _, group = f.projection.partition(" in ")
    statistic = statistic.partition(",")[0]
    group = group.partition(",")[0]
    high = f.effect > 0
    measured = MEASURED[statistic].format(
        large="large" if high else "small",
        up="up" if high else "down",
        down="down" if high else "up",
        amount=amount(f.effect),
    )
    kind = group.split(" ")[0]
    causes = [USUALLY["optimizer"]] if direction_of(f) == "optimizer" else [USUALLY[statistic]]
    causes += [USUALLY[kind]] if kind in USUALLY else []
    if BETWEEN_UPDATES in f.projection:
        causes = [USUALLY["carried"]]
    return [
        ("where", f"op {f.op}, {direction_of(f)}, {where}; result {f.tensor}, {f.dtype} [{shape}]"),
        ("measured", measured + (f", in {group}" if group else "")),
        ("an honest kernel", f"shows at most {amount(f.benign)} here"),
        ("usually", "; or ".join(causes)),
    ]


def _of_run(pair: Pair) -> list[tuple[str, str]]:
    of_gradients = pair.max_gradient_ratio > 1
    if pair.under_plan:
        return [
            ("where", pair.under_plan),
            ("measured", "; ".join(pair.reasons)),
            ("an honest plan", "computes what one process does, but for rounding"),
            ("usually", USUALLY["plan"]),
        ]
    honest = "leaves no op's error behind: a step's gradients stay within their bound"
    return [
        ("where", _subject(pair).rstrip(",")),
        ("measured", "; ".join(pair.reasons)),
        ("an honest kernel", honest if of_gradients else "stays inside the grey band"),
        ("usually", USUALLY["gradients" if of_gradients else "curve"]),
    ]


def rerun(pair: Pair, trace: Trace, options: Sequence[str] | None = None) -> str:
    """Returns the command that judges the guilty call again, or where no captured call is guilty,
    one that searches for the guilty op."""
    from glm_core.align import rerun_command
    from glm_core.config import RunConfig, from_dict

    run: RunConfig = from_dict(RunConfig, trace.config)
    backend = trace.environment.get("one process", pair.candidate)
    words = rerun_command.command(run, backend, options)
    again = ["glm-core", "align", "run", *words[3:-4], "--dtypes", pair.dtype]
    again += ["--backends", backend]
    if "plan" in trace.environment:
        return shlex.join([*again, "--plan", trace.environment["plan"]])
    if pair.findings and BETWEEN_UPDATES in finding_to_name(pair.findings).projection:
        return shlex.join(again)
    captured = [f for f in pair.findings if not f.projection.endswith(AS_IT_HAPPENED)]
    if not captured:
        return rerun_command.join(words, rerun_command.ANY_CALL)
    f = finding_to_name(captured)
    place = (f.layer, f.step) if f.call >= 0 else ("", 0)
    return rerun_command.join(words, rerun_command.CallFilter(f.op, direction_of(f), *place))


def exhibits(finding: Finding) -> list[str]:
    """Returns descriptions of the catalogue's faults that look like this finding: of the same op,
    those that reach its direction, the likeliest kinds first. Where the museum knows a public
    report of one, its project is added."""
    from glm_core.faults.catalogue import FAULTS
    from glm_core.faults.museum.hall import HALL

    shipped = {e.fault: f" (reported: {e.project})" for e in HALL if e.part == "kernel"}
    kinds = KINDS.get(finding.projection.split(" ")[0].rstrip(","), ())
    own = ("update",) if direction_of(finding) == "optimizer" else (finding.direction, "both")
    alike = [f for f in FAULTS if f.op == finding.op and f.direction in own]
    project = {f: shipped.get(f.planted) or shipped.get(f.id, "") for f in alike}
    likely = {f: kinds.index(f.kind) if f.kind in kinds else len(kinds) for f in alike}
    alike.sort(key=lambda f: (likely[f], not project[f]))
    return [f.description + project[f] for f in alike[:MAX_EXHIBITS]]
