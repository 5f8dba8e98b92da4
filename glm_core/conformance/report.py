"""Defines the result of a conformance run: counts, cases and the command that reruns each
failure."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

DECODE = "decode_step"
"""what the ids of whole decode steps begin with"""
OUTCOMES = ("pass", "fail", "unsupported", "xfail")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One case's outcome on one backend."""

    id: str
    backend: str
    outcome: str
    """pass, fail, unsupported (not run: the backend says why) or xfail (a known failure)"""
    error_ratio: float | None = None
    """largest error divided by the reference's own; None where nothing was compared"""
    reason: str = ""
    seconds: float = 0.0
    witness: str = ""
    """the witness file that holds the case's results; empty where the case was run"""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """perf mode: times and rates, each with its unit in its name"""

    @property
    def rerun(self) -> str:
        """Returns the command that runs, or judges from the witness, this case alone."""
        source = ["--witness", self.witness] if self.witness else ["--backend", self.backend]
        decode = ["--decode"] if self.id.startswith(f"{DECODE}-") else []
        words = ["glm-core", "conformance", *source, *decode, "--id", self.id]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values. `error_ratio` is null where it was not measured or is not
        finite."""
        finite = self.error_ratio is not None and math.isfinite(self.error_ratio)
        row = {
            "id": self.id,
            "outcome": self.outcome,
            "error_ratio": self.error_ratio if finite else None,
            "reason": self.reason,
        }
        return row | ({"measured": dict(self.measured)} if self.measured else {})


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The results of a run on one backend."""

    backend: str
    results: Sequence[Result]
    machine: Mapping[str, Any]
    """where it ran: CPU, device, versions, commit"""
    left_out: Sequence[str] = ()
    """the patterns whose cases were left out on request"""

    def count(self, outcome: str) -> int:
        return Counter(r.outcome for r in self.results)[outcome]

    @property
    def failed(self) -> list[Result]:
        return [r for r in self.results if r.outcome == "fail"]

    @property
    def ok(self) -> bool:
        """Did no case fail? Unsupported cases and known failures do not count as failed."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        names = {"passed": "pass", "failed": "fail", "unsupported": "unsupported"}
        counts = {name: self.count(outcome) for name, outcome in names.items()}
        return {
            "backend": self.backend,
            **counts,
            "xfailed": self.count("xfail"),
            "left_out": list(self.left_out),
            "machine": dict(self.machine),
            "cases": [r.to_json() for r in self.results],
        }
