"""Defines the verdict on two machines: what they computed of the same arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_core.align.verdict import finite
from glm_core.verdict.report import Finding, Unjudged

HERE, THERE = "here", "there"
"""the two sides: this machine, and the one that made the record"""
WHERE = {HERE: "here", THERE: "there", "both": "on both machines"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two machines computed of the same arguments."""

    record: str
    """the file"""
    program: str
    """that made the record"""
    devices: list[str]
    """there"""
    torch: str
    """version there"""
    steps: list[int]
    here: str
    """the device that computed the calls again"""
    calls: int
    """that both machines computed"""
    equal: int
    """of these: calls whose results have the same bits"""
    only_there: list[str]
    """operators that were judged wrong there as they ran, and are not among the findings: a record
    holds a sample"""
    findings: dict[str, list[Finding]]
    """by side: the worst call of each operator that is wrong there"""
    not_compared: list[Unjudged]
    num_tests: int

    @property
    def ok(self) -> bool:
        """Says whether all differences are honest rounding."""
        return not any(self.findings.values()) and not self.only_there

    def sides(self) -> dict[str, str]:
        """Returns where each guilty operator is wrong: here, there, or on both machines."""
        by_side = {side: {f.operator for f in own} for side, own in self.findings.items()}
        both = by_side[HERE] & by_side[THERE]
        return {
            f.operator: "both" if f.operator in both else side
            for side, own in self.findings.items()
            for f in own
        }

    def sentence(self) -> str:
        """Returns the comparison in one sentence."""
        there = f"{self.program} on {', '.join(self.devices)}, torch {self.torch}"
        what = f"against {self.record} ({there}): of {self.calls} recorded calls, computed again "
        what += f"on {self.here}, {self.equal} have the same bits"
        rest = f"; {sum(u.calls for u in self.not_compared)} were not compared"
        rest = rest if self.not_compared else ""
        if self.only_there:
            rest = f"; judged wrong there as they ran: {', '.join(self.only_there)}{rest}"
        if not self.calls:
            return f"against {self.record} ({there}): nothing was compared{rest}"
        wrong = [f"{name} is wrong {WHERE[side]}" for name, side in self.sides().items()]
        if not wrong:
            differ = self.calls - self.equal
            honest = f" and {differ} differ by honest rounding" if differ else ""
            return f"{what}{honest}{rest}"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"{what}; {', '.join(wrong[:3])}{more}{rest}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        plain = dataclasses.asdict(self)
        for row in (f for own in plain["findings"].values() for f in own):
            row.update({k: finite(v) for k, v in row.items()})
        return {"sentence": self.sentence(), **plain}


def from_json(value: dict[str, Any]) -> Comparison:
    """Returns the comparison that `to_json` gave."""
    fields = {k: v for k, v in value.items() if k != "sentence"}
    own = value["findings"].items()
    fields["findings"] = {side: [Finding(**f) for f in rows] for side, rows in own}
    fields["not_compared"] = [Unjudged(**u) for u in value["not_compared"]]
    return Comparison(**fields)
