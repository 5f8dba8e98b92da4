"""Predictions beside published step times."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from glm_core.planner import published
from glm_core.planner.cost import fullest_stage
from glm_core.planner.efficiency import Factors, fitted, predict

MISS = 0.10
"""an error beyond which a row is a miss, to be explained"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One run: predicted and reported seconds."""

    run: published.Run
    predicted_step_s: float

    @property
    def error(self) -> float:
        """Predicted over reported, less 1."""
        return self.predicted_step_s / self.run.step_s - 1

    def to_json(self) -> dict[str, Any]:
        r = self.run
        peak = sum(fullest_stage(r.plan, r.work).values()) / 1e9
        told = math.isfinite(r.memory_gb)
        return {
            "source": r.source,
            "model": r.model,
            "chips": r.plan.chips,
            "chip": r.cluster.name,
            "family": r.cluster.family,
            "stack": r.stack,
            "plan": r.plan.label(),
            "predicted_step_s": self.predicted_step_s,
            "reported_step_s": r.step_s,
            "error": self.error,
            "held_out": r.role == "held",
            "checked": r.checked,
            "predicted_memory_gb": peak,
            "reported_memory_gb": r.memory_gb if told else None,
            "note": r.note,
            "url": r.url,
        }


def verdicts() -> list[Verdict]:
    """Every run that can be predicted."""
    return [
        Verdict(run=r, predicted_step_s=predict(r.plan, r.work, r.cluster, r.stack).seconds)
        for r in published.runs()
        if r.role != "skip" and math.isfinite(r.step_s)
    ]


def report() -> dict[str, Any]:
    """Rows, medians of |error| over held-out rows, the fitted factors and what was left out."""
    found = verdicts()
    held = [v for v in found if v.run.role == "held"]
    families = sorted({v.run.cluster.family for v in held})
    groups = sorted({(v.run.cluster.family, v.run.stack) for v in found})
    factors: dict[str, Factors] = {f"{f} {s}": fitted(f, s) for f, s in groups}
    rows = [v.to_json() for v in found]
    return {
        "rows": rows,
        "median_abs_error_held_out": _median(held),
        "families": {
            f: {"held_out": len(of), "median_abs_error": _median(of)}
            for f in families
            for of in [[v for v in held if v.run.cluster.family == f]]
        },
        "median_abs_memory_error": statistics.median(
            abs(r["predicted_memory_gb"] / r["reported_memory_gb"] - 1)
            for r in rows
            if r["reported_memory_gb"]
        ),
        "factors": {k: dataclasses.asdict(f) for k, f in factors.items()},
        "skipped": [
            {"source": r.source, "model": r.model, "reason": r.note}
            for r in published.runs()
            if r.role == "skip"
        ],
    }


LIMIT = 0.10
"""the median error of held-out rows that is accepted"""


def passes(report: dict[str, Any]) -> bool:
    """The median is within the limit, and every held-out miss says why."""
    misses = [r for r in report["rows"] if r["held_out"] and abs(r["error"]) > MISS]
    explained = all(r["note"] for r in misses)
    return explained and report["median_abs_error_held_out"] <= LIMIT


def _median(of: list[Verdict]) -> float:
    return statistics.median(abs(v.error) for v in of)
