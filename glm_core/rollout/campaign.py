"""Measures the verdict on rollouts: how many planted mistakes of engines are found and named, and
how many honest differences are acquitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from glm_core.model.sample import Sampling
from glm_core.rollout.distribution import Shaping
from glm_core.rollout.evidence import Progress
from glm_core.rollout.files import Settings
from glm_core.rollout.paths import Parting, Paths
from glm_core.rollout.planted import MODELS, Case, Plant, honest, make_case, plants
from glm_core.rollout.verdict import judge

TARGET = 0.95
"""share of the planted mistakes that must be found, and that must be named"""
PENALTY = 1.5
"""repetition penalty that a sampler leaves out"""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one plant in one case."""

    case: str
    label: str
    cause: str
    """empty: honest"""
    diverged: bool
    """by the log probabilities"""
    named: str
    share: float
    parted: bool
    """by bisecting both paths"""
    placed: bool
    """whether the op at which they part is the right one"""
    place: str

    @property
    def is_found(self) -> bool:
        """Whether the log probabilities or the paths convict it."""
        return self.diverged or self.parted

    @property
    def is_named(self) -> bool:
        """Whether the mistake is named, or the op it happens in."""
        return self.named == self.cause or (self.parted and self.placed)


@dataclasses.dataclass(frozen=True, slots=True)
class Campaign:
    """All outcomes."""

    rows: list[Row]

    @property
    def planted(self) -> list[Row]:
        """Returns the rows of mistakes."""
        return [r for r in self.rows if r.cause]

    @property
    def alarms(self) -> list[Row]:
        """Returns the honest ones that were convicted."""
        return [r for r in self.rows if not r.cause and r.is_found]

    @property
    def reached(self) -> bool:
        """Whether enough are found and named, and nothing honest is convicted."""
        found, named = (
            sum(getattr(r, what) for r in self.planted) for what in ("is_found", "is_named")
        )
        return min(found, named) >= TARGET * len(self.planted) and not self.alarms

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"rows": [dataclasses.asdict(r) for r in self.rows], "reached": self.reached}

    def text(self) -> str:
        """Returns a table with a row for each plant, and a summary."""
        table = [["planted", "cases", "by log probabilities", "named", "paths part", "at its op"]]
        for label in dict.fromkeys(r.label for r in self.rows):
            rows = [r for r in self.rows if r.label == label]
            counts = [
                len(rows),
                sum(r.diverged for r in rows),
                sum(r.named == r.cause for r in rows) if rows[0].cause else 0,
                sum(r.parted for r in rows),
                sum(r.parted and r.placed for r in rows),
            ]
            table.append([label, *map(str, counts)])
        rows = self.planted
        found, named = sum(r.is_found for r in rows), sum(r.is_named for r in rows)
        lines = [f"| {' | '.join(row)} |" for row in table]
        lines.insert(1, "|---|" + "---|" * (len(table[0]) - 1))
        alone = sum(r.named == r.cause for r in rows)
        honest = len(self.rows) - len(rows)
        summary = (
            f"{found} of {len(rows)} planted mistakes found, {named} named or placed, {alone} "
            f"named by log probabilities alone; {len(self.alarms)} of {honest} honest differences "
            "convicted"
        )
        return "\n".join([*lines, "", summary])


def judged(case: Case, plant: Plant, paths: Paths | None = None) -> Row:
    """Returns the outcome of one plant."""
    e = case.evidence
    outcome = judge(
        plant.engine(case), e.base, e.controls, case.replies, e.causes, e.others, e.drawn
    )
    parting = Parting()
    if paths is not None and plant.how is not None:
        parting = paths.part(how=plant.how(case))
    diverged = outcome.verdict == "diverged"
    return Row(
        case.name,
        plant.label,
        plant.cause,
        diverged,
        outcome.cause,
        outcome.share,
        bool(parting.op),
        parting.op == plant.op,
        parting.text(),
    )


def penalised(kind: str, dtype: str, seed: int) -> Iterator[Row]:
    """Yields outcomes where the settings state a penalty: reported without it, and drawn without
    it."""
    stated = Settings(dtype=dtype, temperature=1.0, repetition_penalty=PENALTY, processed=True)
    case = make_case(kind, dtype, seed, stated)
    yield judged(case, Plant("as stated, with a penalty", "", lambda c: c.engine()))
    label = "reported from logits before a penalty"
    yield judged(case, Plant(label, "penalty", lambda c: c.engine(shaping=Shaping())))
    case = make_case(kind, dtype, seed, stated, Sampling())
    yield judged(case, Plant("sampled from logits before a penalty", "draws", lambda c: c.engine()))


def campaign(
    kinds: Sequence[str] = tuple(MODELS),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    seeds: Sequence[int] = (1, 2),
    progress: Progress | None = None,
) -> Campaign:
    """Judges every plant in every case it applies to."""
    rows: list[Row] = []
    cases = [(k, d, s) for s in seeds for k in kinds for d in dtypes]
    for number, (kind, dtype, seed) in enumerate(cases):
        if progress:
            progress(f"{kind} {dtype}", number, len(cases))
        case = make_case(kind, dtype, seed)
        paths = Paths({0: case.model}, case.replies)
        rows += [
            judged(case, plant, paths)
            for plant in [*plants(), *honest()]
            if all(only in (kind, dtype) for only in plant.only)
        ]
        rows += penalised(kind, dtype, seed)
    return Campaign(rows)
