"""Judges the loss curve of a program: does it stay as close to the reference's as control runs of
the same program do, whose weights were moved by a unit in the last place?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from glm_core.align import MIN_CONTROLS
from glm_core.align.envelope import envelope
from glm_core.align.verdict import finite

SAME, SAME_DATA = 0.01, 0.1
"""sketches that differ by more are of other weights, or of gradients of other data: runs on one
machine, before any weight is moved"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CurveVerdict:
    """The verdict on a loss curve, or why there is none."""

    missing: str = ""
    """why there is none; empty where there is one"""
    loss: list[float] = dataclasses.field(default_factory=list)
    reference: list[float] = dataclasses.field(default_factory=list)
    controls: list[list[float]] = dataclasses.field(default_factory=list)
    bound: list[float] = dataclasses.field(default_factory=list)
    """how far from the reference an honest run may be, by step"""
    ratio: float = 0.0
    """the largest share of the bound; above 1 is outside"""
    first_step: int | None = None
    """the first step outside"""

    @property
    def ok(self) -> bool:
        """Says whether the curve is inside, or was not judged."""
        return self.first_step is None

    def sentence(self) -> str:
        """Returns the verdict in one sentence."""
        if self.missing:
            return f"the loss curve is not judged: {self.missing}"
        what = f"{len(self.loss)} steps, {len(self.controls)} control runs"
        if self.loss == self.reference:
            return f"the loss curve is the reference's to the bit ({what})"
        if self.first_step is None:
            return (
                f"the loss curve stays in its envelope ({what}): at most {self.ratio:.2g} of what "
                "rounding explains"
            )
        return (
            f"the loss curve leaves its envelope at step {self.first_step} ({what}): up to "
            f"{self.ratio:.3g} times what rounding explains"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; what is not finite becomes 1e30."""
        plain = dataclasses.asdict(self)
        plain["ratio"], plain["loss"] = finite(self.ratio), [finite(x) for x in self.loss]
        return {"sentence": self.sentence(), **plain}


def judge_curve(
    reference: dict[str, Any],
    controls: list[dict[str, Any]],
    candidate: dict[str, Any],
    rate: float,
) -> CurveVerdict:
    """Judges a candidate's curve, each given as `Curve.to_json` gives it."""
    reason = why_not(reference, controls, candidate)
    if not reason and len(controls) < MIN_CONTROLS:
        reason = f"{len(controls)} control runs, {MIN_CONTROLS} at least are needed"
    if reason:
        return CurveVerdict(missing=reason)
    curves = [np.array(c["loss"], np.float64) for c in (reference, candidate, *controls)]
    length = min(c.size for c in curves)
    plain, loss, *others = (c[:length] for c in curves)
    inside = envelope(plain, np.stack(others), loss, rate)
    return CurveVerdict(
        loss=[float(x) for x in np.nan_to_num(loss, nan=np.inf)],
        reference=plain.tolist(),
        controls=[c.tolist() for c in others],
        bound=inside.bound.tolist(),
        ratio=float(inside.ratio.max()),
        first_step=inside.first_step,
    )


def why_not(
    reference: dict[str, Any], controls: list[dict[str, Any]], candidate: dict[str, Any]
) -> str:
    """Returns why these curves cannot be judged, "" where they can."""
    if not reference["loss"] or not candidate["loss"]:
        return "no step was followed"
    if any(x is None for c in (reference, *controls) for x in c["loss"]):
        return (
            "in some step backward was called on no scalar, or the loss was not finite without the "
            "candidate's help"
        )
    seed = "; seed torch, random, numpy and the data loader"
    if not all(_same(reference["weights"], c["weights"], SAME) for c in controls):
        return f"two runs of the script start with other weights{seed}"
    if not all(_same(reference["gradients"], c["gradients"], SAME_DATA) for c in controls):
        return f"two runs of the script have other gradients in their first step{seed}"
    if not _same(reference["weights"], candidate["weights"], SAME):
        return f"this run starts with other weights than the reference{seed}"
    return ""


def _same(a: Any, b: Any, limit: float) -> bool:
    x, y = np.array(a, np.float64), np.array(b, np.float64)
    return x.shape == y.shape and bool((np.abs(x - y) < limit).all())
