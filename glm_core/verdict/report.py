"""Defines the verdict on a program: what was judged, which operators are guilty, what was not
judged."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from glm_core.align.verdict import NOT_FINITE, finite

MAX_FINDINGS = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A call of an operator that computed what no honest rounding explains."""

    operator: str
    result: str
    """`y`, `y0`, ..., or the name of the argument that it wrote"""
    module: str
    line: str
    phase: str
    step: int
    dtype: str
    shape: list[int]
    test: str
    effect: float
    """relative to the result; infinite where no number says it"""
    limit: float
    """the largest effect that honest rounding explains, safety factor included"""
    ratio: float
    """share of what is allowed, significance included; above 1 is guilty"""
    calls: int = 1
    """guilty calls of this operator, of which this one is the worst"""
    ranks: list[int] = dataclasses.field(default_factory=list)
    """of a job: those where the operator is wrong, that of this call first"""

    def where(self) -> str:
        """Returns the place in words."""
        file, _, number = self.line.rpartition(":")
        module = f" in {self.module}" if self.module else ""
        return f"{self.phase}{module} ({os.path.basename(file)}:{number}), step {self.step}"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        off = self.test
        if self.effect < NOT_FINITE:
            off += f" {self.effect:.2e}, benign up to {self.limit:.1e}"
        where = self.where() + (f", rank {self.ranks[0]}" if self.ranks else "")
        if len(self.ranks) > 1:
            where += f" (also {', '.join(map(str, self.ranks[1:]))})"
        return f"{self.operator} {where}: {self.result} [{shape}] {self.dtype}: {off}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unjudged:
    """An operator that was not judged."""

    operator: str
    calls: int
    flops_share: float
    """of the captured steps"""
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One operator that was judged."""

    operator: str
    calls: int
    guilty: int
    ratio: float
    """the largest share of what is allowed"""
    flops_share: float
    rank: int | None = None
    """of a job: the one that has the largest share"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The verdict on one run of a program."""

    program: str
    devices: list[str]
    steps: list[int]
    """optimizer steps that were captured"""
    findings: list[Finding]
    """the worst call of each guilty operator, the largest ratio first"""
    operators: list[Row]
    not_judged: list[Unjudged]
    num_tests: int
    false_alarm_rate: float
    seconds: float
    """that the captured steps took, judging included"""
    peak_memory_bytes: int
    """of the process"""
    context: str = ""
    """the context manager that was active"""
    torch: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    """what else limits the verdict"""
    ranks: list[str] = dataclasses.field(default_factory=list)
    """of a job: the sentence of each rank's own verdict"""

    @property
    def ok(self) -> bool:
        """Says whether no operator is guilty."""
        return not self.findings

    @property
    def judged(self) -> int:
        """Returns the number of calls that were judged."""
        return sum(r.calls for r in self.operators)

    def sentence(self) -> str:
        """Returns the verdict in one sentence."""
        steps = ", ".join(map(str, self.steps))
        where = f"on {', '.join(self.devices) or 'no device'}"
        where += f" with {self.context}" if self.context else ""
        what = f"{self.program} {where}, step {steps}"
        rest = self._rest()
        if self.ok:
            return f"{what}: all {self.judged} judged operator calls are honest rounding{rest}"
        names = ", ".join(f.operator for f in self.findings[:3])
        more = f" and {len(self.findings) - 3} more" if len(self.findings) > 3 else ""
        guilty = sum(f.calls for f in self.findings)
        return (
            f"{what}: {guilty} of {self.judged} judged operator calls are wrong: {names}{more}; "
            f"first {self.findings[0]}{rest}"
        )

    def _rest(self) -> str:
        if not self.not_judged:
            return "; nothing was left out"
        calls = sum(u.calls for u in self.not_judged)
        share = 100 * sum(u.flops_share for u in self.not_judged)
        number = "1 call was" if calls == 1 else f"{calls} calls were"
        return f"; {number} not judged ({share:.2g} % of the FLOPs)"

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; what is not finite becomes 1e30."""
        plain = dataclasses.asdict(self)
        for row in plain["findings"] + plain["operators"]:
            row.update({k: finite(v) for k, v in row.items()})
        return {"verdict": "honest" if self.ok else "guilty", "sentence": self.sentence(), **plain}


def from_json(value: dict[str, Any]) -> Report:
    """Returns the report that `to_json` gave."""
    fields = {k: v for k, v in value.items() if k not in ("verdict", "sentence")}
    fields["findings"] = [Finding(**f) for f in value["findings"]]
    fields["operators"] = [Row(**r) for r in value["operators"]]
    fields["not_judged"] = [Unjudged(**u) for u in value["not_judged"]]
    return Report(**fields)
