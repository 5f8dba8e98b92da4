"""Compares predictions with published step times."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from glm_core.planner import published
from glm_core.planner.cost import fullest_stage
from glm_core.planner.efficiency import Factors, fitted, predict

MISS = 0.10
"""relative error beyond which a row is a miss, which its note must explain"""
LIMIT = 0.10
"""largest median error of held-out rows that passes"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A published run with its predicted seconds."""

    run: published.Run
    predicted_step_s: float

    @property
    def error(self) -> float:
        """Predicted over reported seconds, less 1."""
        return self.predicted_step_s / self.run.step_s - 1

    def to_json(self) -> dict[str, Any]:
        r = self.run
        peak = sum(fullest_stage(r.plan, r.work).values()) / 1e9
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
            "reported_memory_gb": r.memory_gb if math.isfinite(r.memory_gb) else None,
            "note": r.note,
            "url": r.url,
        }


def predictions() -> list[Prediction]:
    """Returns the prediction of every run that can be predicted."""
    return [
        Prediction(run=r, predicted_step_s=predict(r.plan, r.work, r.cluster, r.stack).seconds)
        for r in published.runs()
        if r.role != "skip" and math.isfinite(r.step_s)
    ]


def report() -> dict[str, Any]:
    """Returns rows, medians of |error| over held-out rows, fitted factors, and the runs left
    out."""
    every = predictions()
    held = [p for p in every if p.run.role == "held"]
    families = sorted({p.run.cluster.family for p in held})
    groups = sorted({(p.run.cluster.family, p.run.stack) for p in every})
    factors: dict[str, Factors] = {f"{f} {s}": fitted(f, s) for f, s in groups}
    rows = [p.to_json() for p in every]
    return {
        "rows": rows,
        "median_abs_error_held_out": _median(held),
        "families": {
            f: {"held_out": len(of_family), "median_abs_error": _median(of_family)}
            for f in families
            for of_family in [[p for p in held if p.run.cluster.family == f]]
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


def passes(report: dict[str, Any]) -> bool:
    """Returns whether the median is within the limit and every held-out miss has a note."""
    misses = [r for r in report["rows"] if r["held_out"] and abs(r["error"]) > MISS]
    explained = all(r["note"] for r in misses)
    return explained and report["median_abs_error_held_out"] <= LIMIT


def _median(predictions: list[Prediction]) -> float:
    return statistics.median(abs(p.error) for p in predictions)
