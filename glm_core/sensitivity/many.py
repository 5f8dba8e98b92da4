"""Judges the museum's exhibits of many processes by the proof of a plan: it trains as one process
does, and each process has the same copies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_core.distributed.plan import lacks, parse
from glm_core.faults.museum.exhibit import Exhibit
from glm_core.sensitivity.judges import ACQUITTED, Verdict, place
from glm_core.sensitivity.plans import baseline, jobs
from glm_core.sensitivity.plans.case import Case

MODEL = "130b"
PROOF = "plan proof"


def proofs(exhibits: list[Exhibit]) -> Iterator[tuple[str, Exhibit | None, Verdict, float]]:
    """Yields name, exhibit, verdict and seconds: of each exhibit, and of every honest plan among
    theirs. One job of processes trains all cases of its size."""
    base = baseline.make(MODEL, "float32")
    entries: list[tuple[str, Exhibit | None, Case]] = [
        (e.name, e, Case(e.plan, MODEL, bug=e.fault)) for e in exhibits
    ]
    plans = dict.fromkeys(e.plan for e in exhibits)
    entries += [(f"honest-{plan}", None, Case(plan, MODEL)) for plan in plans]
    able = [entry for entry in entries if not lacks(parse(entry[2].plan))]
    for world in sorted({case.world for _, _, case in able}):
        mine = [entry for entry in able if entry[2].world == world]
        with tempfile.TemporaryDirectory() as folder:
            reports = jobs.run([case for _, _, case in mine], world, Path(folder) / "job")
        for (name, exhibit, _), report in zip(mine, reports, strict=True):
            yield name, exhibit, verdict(base, report), report[0].get("seconds", 0.0)
    for name, exhibit, case in entries:
        if reasons := lacks(parse(case.plan)):
            yield name, exhibit, Verdict(why="; ".join(reasons)), 0.0


def verdict(base: baseline.Baseline, report: list[dict[str, Any]]) -> Verdict:
    """Says what the proof finds first: the first step's loss, gradients, norm and weights, then
    the curve's and the last weights."""
    if errors := [r["error"] for r in report if "error" in r]:
        return Verdict(PROOF, "error", errors[-1].strip().splitlines()[-1])
    if not all(report):
        return Verdict(why="an earlier case of this job failed, or it ran out of time")
    shapes = {n: w.shape for n, w in base.weights.items()}
    names = sorted(shapes)
    grads, apart = jobs.gathered([p for r in report for p in r["gradient"]], shapes)
    weights, later = jobs.gathered([p for r in report for p in r["weight"]], shapes)
    first, _ = jobs.gathered([p for r in report for p in r["first"]], shapes)
    loss, norm = (base.curve(kind, report[0][kind]) for kind in ("loss", "norm"))
    gradient, one_step = base.gradients(grads), base.first_weights(first)
    last = base.last_weights(weights)
    for when, excess, where in (
        ("the first step", loss[:1], "loss"),
        ("the first step", gradient, place("gradient", gradient, names)),
        ("the first step", norm[:1], "gradient norm"),
        ("the first step", one_step, place("weight", one_step, names)),
        ("later steps", loss, "loss"),
        ("later steps", norm, "gradient norm"),
        ("the last step", last, place("weight", last, names)),
    ):
        if excess.max() > 1:
            return Verdict(PROOF, where, f"{when}: {excess.max():.3g} times its bound")
    if max(apart, later) > 0:
        return Verdict(PROOF, "copies", "copies of a tensor differ between processes")
    return ACQUITTED
