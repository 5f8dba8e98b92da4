"""Holds what was judged so far, and draws the verdict from it when all is judged."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

from glm_core.align import statistics
from glm_core.verdict.judge import Judgement
from glm_core.verdict.places import Place
from glm_core.verdict.report import MAX_FINDINGS, Finding, Row, Unjudged


class Docket:
    """The cases so far: what was judged, what was not, and what is outside."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.least_z = statistics.critical_z(rate, 1)
        self.num_tests = 0
        self.calls: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.ratios: dict[str, float] = defaultdict(float)
        self.unjudged: dict[tuple[str, str], list[float]] = {}
        """by operator and reason: calls and FLOPs"""
        self.outside: list[tuple[str, Place, int, Judgement]] = []
        self.devices: set[str] = set()

    def leave_out(self, name: str, reason: str, flops: float) -> None:
        """Notes a call that is not judged."""
        count = self.unjudged.setdefault((name, reason), [0, 0.0])
        count[0] += 1
        count[1] += flops

    def add(self, name: str, place: Place, step: int, judgement: Judgement, flops: float) -> None:
        """Notes a call that was judged."""
        self.calls[name] += 1
        self.flops[name] += int(flops)
        self.num_tests += judgement.num_tests
        if judgement.outside:
            self.outside.append((name, place, step, judgement))
        self.ratios[name] = max(self.ratios[name], judgement.ratio)

    def findings(self, rate: float) -> list[Finding]:
        """Returns the worst call of each guilty operator, the largest ratio first. `rate` is the
        share of the false-alarm rate that these calls have."""
        z = statistics.critical_z(rate, self.num_tests)
        worst: dict[str, Finding] = {}
        calls: Counter[str] = Counter()
        for name, place, step, judgement in self.outside:
            test = max(judgement.outside, key=lambda o: o.ratio(z))
            ratio = test.ratio(z)
            self.ratios[name] = max(self.ratios[name], ratio)
            if ratio <= 1:
                continue
            calls[name] += 1
            if name not in worst or worst[name].ratio < ratio:
                worst[name] = Finding(
                    operator=name,
                    result=test.result,
                    module=place.module,
                    line=place.line,
                    phase=place.phase,
                    step=step,
                    dtype=test.dtype,
                    shape=list(test.shape),
                    test=test.test,
                    effect=abs(test.effect),
                    limit=test.limit,
                    ratio=ratio,
                )
        counted = [dataclasses.replace(f, calls=calls[n]) for n, f in worst.items()]
        return sorted(counted, key=lambda f: -f.ratio)[:MAX_FINDINGS]

    def rows(self, findings: list[Finding]) -> list[Row]:
        """Returns the judged operators, the largest share of FLOPs first."""
        total, guilty = self._total(), {f.operator: f.calls for f in findings}
        return [
            Row(
                operator=name,
                calls=calls,
                guilty=guilty.get(name, 0),
                ratio=self.ratios[name],
                flops_share=self.flops[name] / total,
            )
            for name, calls in sorted(self.calls.items(), key=lambda c: -self.flops[c[0]])
        ]

    def not_judged(self) -> list[Unjudged]:
        """Returns the operators that were not judged, the largest share of FLOPs first."""
        total = self._total()
        rows = [
            Unjudged(operator=name, calls=int(calls), flops_share=flops / total, reason=reason)
            for (name, reason), (calls, flops) in self.unjudged.items()
        ]
        return sorted(rows, key=lambda u: (-u.flops_share, u.operator))

    def _total(self) -> float:
        left_out = sum(flops for _, flops in self.unjudged.values())
        return max(sum(self.flops.values()) + left_out, 1.0)
