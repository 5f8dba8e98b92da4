"""Compares two rollouts, or one with what its weights say, and puts the outcome into words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_core.errors import RolloutError
from glm_core.rollout.evidence import Evidence
from glm_core.rollout.files import Rollout, require_same
from glm_core.rollout.verdict import Check, Figures, Judgement, figures, judge

MOST_STEPS = 10
"""steps whose deviations are printed; --json has all"""
UNJUDGED = (
    "what honest rounding may do is not known; give the weights with --model, or the same tokens "
    "from an honest engine with --control"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of `align rollout`."""

    verdict: str
    """identical, aligned, diverged or not judged"""
    sentence: str
    dtype: str
    figures: Figures
    """of the trainer's log probabilities against the sampler's"""
    sides: dict[str, Judgement]
    """by what was judged: a file, each by itself against the weights"""
    place: str = ""
    """layer and op where the paths part, where they were bisected"""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """Returns some lines to read."""
        f = self.figures
        low, *inner, high = (f"{r:.6g}" for r in f.ratio)
        every = -(-len(f.by_step) // MOST_STEPS)
        steps = "  ".join(f"{s}: {x:.2e}" for s, x in [*f.by_step.items()][::every])
        lines = [
            f"{self.verdict}: {self.sentence}",
            f"  {f.tokens} tokens, {f.equal:.1%} equal to the bit; |d logprob| mean {f.mean:.3e}, "
            f"max {f.max:.3e}; KL k1 {f.k1:.3e}, k3 {f.k3:.3e}",
            f"  ratio min {low}, 1 % {inner[0]}, median {inner[1]}, 99 % {inner[2]}, max {high}",
            f"  mean |d logprob| by step  {steps}",
        ]
        for name, side in self.sides.items():
            lines += [f"  {name}: {_words(side, self.dtype)}"]
            lines += [f"    {t.group}: {_check(t)}" for t in side.tests[:3]]
        return "\n".join([*lines, *([f"  {self.place}"] if self.place else [])])


def _check(t: Check) -> str:
    return f"{t.statistic} {t.effect:.2e}, honest up to {t.allowed:.1e}"


def _words(side: Judgement, dtype: str) -> str:
    """Returns the outcome of one side as a sentence."""
    times = side.mean / side.honest if side.honest else 0.0
    size = (
        f"mean |d logprob| {side.mean:.2e}, {times:.3g} times what honest {dtype or 'rounding'} "
        f"gives for these weights and tokens ({side.honest:.1e} at most)"
    )
    if side.ties:
        size += f", {side.ties} tokens at a router's near tie"
    if side.verdict != "diverged":
        return f"{side.verdict}: {size}"
    return (
        f"{side.sentence or 'the cause is none of the known ones'}: {size}; begins at {side.begins}"
    )


def compare(a: Rollout, b: Rollout, evidence: Evidence | None, names: Sequence[str]) -> Report:
    """Returns the report on a trainer's rollout `a` and a sampler's `b` of the same tokens. Each
    side is judged against the evidence; without any, nothing is. names: which sides are judged, by
    their files' names. Raises RolloutError where they do not match."""
    require_same(a, b)
    shown = figures(a.logprobs, b.logprobs, b.replies)
    dtype = b.settings.dtype or a.settings.dtype
    if evidence is None:
        same = not (a.logprobs - b.logprobs).any()
        verdict, sentence = ("identical", SAME) if same else ("not judged", UNJUDGED)
        return Report(verdict=verdict, sentence=sentence, dtype=dtype, figures=shown, sides={})
    sides = {
        r.name: judge(
            r.logprobs,
            evidence.base,
            evidence.controls,
            r.replies,
            evidence.causes,
            evidence.others,
            evidence.drawn,
        )
        for r in (a, b)
        if r.name in names
    }
    guilty = {n: s for n, s in sides.items() if s.verdict == "diverged"}
    if not guilty:
        same = not (a.logprobs - b.logprobs).any()
        sentence = SAME if same else f"honest rounding explains all deviations ({dtype})"
        verdict = "identical" if same else "aligned"
        return Report(verdict=verdict, sentence=sentence, dtype=dtype, figures=shown, sides=sides)
    name, worst = max(guilty.items(), key=lambda item: item[1].share)
    sentence = f"{name}: {_words(worst, dtype)}"
    return Report(verdict="diverged", sentence=sentence, dtype=dtype, figures=shown, sides=sides)


SAME = "all log probabilities are the same to the bit"


def from_controls(a: Rollout, others: Sequence[Rollout]) -> Evidence:
    """Returns the evidence that honest engines' files give about the tokens of `a`, which then
    stands for the correct ones. Raises RolloutError where they do not match."""
    if not others:
        raise RolloutError("controls: there are none; give at least one file of an honest engine")
    for other in others:
        require_same(a, other)
    return Evidence(
        a.logprobs, np.stack([o.logprobs for o in others]), [], np.zeros((0, a.logprobs.size))
    )
