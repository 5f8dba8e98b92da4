"""Makes one verdict on a job of those of its ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from glm_core.distributed.reports import Job
from glm_core.verdict import comparison
from glm_core.verdict.comparison import HERE, THERE, Comparison
from glm_core.verdict.report import MAX_FINDINGS, Finding, Report, Row, Unjudged, from_json

PARTS = ("report", "unit", "comparison", "curve")
"""what a rank's result holds for the others"""


def of_job(job: Job, result: dict[str, Any]) -> dict[str, Any] | None:
    """Returns one result on all ranks on rank 0, None on the others. Every rank of a job has to
    call this, once."""
    texts = job.gathered(json.dumps({n: result[n] for n in PARTS if n in result}))
    if texts is None:
        return None
    found = {rank: json.loads(text) for rank, text in enumerate(texts) if text}

    def of_ranks(name: str) -> dict[int, Any]:
        return {rank: own[name] for rank, own in found.items() if name in own}

    whole = dict(result)
    if reports := {r: from_json(own) for r, own in of_ranks("report").items()}:
        whole["report"] = merged(reports, job.world).to_json()
        whole["unit"] = max(of_ranks("unit").values())
    if compared := {r: comparison.from_json(c) for r, c in of_ranks("comparison").items()}:
        whole["comparison"] = merged_comparisons(compared, job.world).to_json()
    if curves := of_ranks("curve"):
        whole["curve"] = merged_curves(list(curves.values()))
    return whole


def merged_comparisons(compared: Mapping[int, Comparison], world: int) -> Comparison:
    """Returns one comparison on these ranks of a job, each of them with a record."""
    own = list(compared.values())
    first = own[0]
    program = first.program
    if any(c.program != program for c in own):
        count = f"{len(own)} of {world} ranks" if len(own) < world else f"{world} ranks"
        program = f"{program.rpartition(', rank ')[0]}, {count}"
    findings = {
        side: _findings({rank: c.findings[side] for rank, c in compared.items()})
        for side in (HERE, THERE)
    }
    return dataclasses.replace(
        first,
        program=program,
        devices=sorted({device for c in own for device in c.devices}),
        calls=sum(c.calls for c in own),
        equal=sum(c.equal for c in own),
        only_there=sorted({name for c in own for name in c.only_there}),
        findings=findings,
        not_compared=_unjudged([c.not_compared for c in own]),
        num_tests=sum(c.num_tests for c in own),
    )


def merged_curves(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the curve of a job: the mean of the losses of those ranks that have one."""
    losses = [c["loss"] for c in curves]
    with_loss = [own for own in losses if any(x is not None for x in own)] or losses[:1]
    loss = [
        None if None in step else math.fsum(step) / len(step)
        for step in zip(*with_loss, strict=False)
    ]
    sketches = ("weights", "gradients")
    return {"loss": loss, **{n: [x for c in curves for x in c[n]] for n in sketches}}


def merged(reports: dict[int, Report], world: int) -> Report:
    """Returns one report on these ranks of a job. A rank that is missing is named in a note."""
    first = next(iter(reports.values()))
    missing = [str(rank) for rank in range(world) if rank not in reports]
    notes = list(dict.fromkeys(note for report in reports.values() for note in report.notes))
    if missing:
        notes.append(f"no report came from rank {', '.join(missing)}: it is not judged here")
    count = f"{len(reports)} of {world} ranks" if missing else f"{world} ranks"
    return dataclasses.replace(
        first,
        program=f"{first.program.rpartition(', rank ')[0]}, {count}",
        devices=sorted({device for report in reports.values() for device in report.devices}),
        findings=_findings({rank: report.findings for rank, report in reports.items()}),
        operators=_rows(reports),
        not_judged=_unjudged([report.not_judged for report in reports.values()]),
        num_tests=sum(report.num_tests for report in reports.values()),
        false_alarm_rate=sum(report.false_alarm_rate for report in reports.values()),
        seconds=max(report.seconds for report in reports.values()),
        peak_memory_bytes=max(report.peak_memory_bytes for report in reports.values()),
        notes=notes,
        ranks=[report.sentence() for report in reports.values()],
    )


def _findings(found: Mapping[int, list[Finding]]) -> list[Finding]:
    """Returns each guilty operator at the rank where it is worst, the worst operator first."""
    by_operator: dict[str, list[tuple[int, Finding]]] = defaultdict(list)
    for rank, findings in found.items():
        for finding in findings:
            by_operator[finding.operator].append((rank, finding))
    worst = []
    for own in by_operator.values():
        own.sort(key=lambda f: -f[1].ratio)
        calls, ranks = sum(f.calls for _, f in own), [rank for rank, _ in own]
        worst.append(dataclasses.replace(own[0][1], calls=calls, ranks=ranks))
    return sorted(worst, key=lambda f: -f.ratio)[:MAX_FINDINGS]


def _rows(reports: dict[int, Report]) -> list[Row]:
    """Returns the operators with the calls of all ranks: those that are wrong first, then those
    with the most FLOPs."""
    by_operator: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for rank, report in reports.items():
        for row in report.operators:
            by_operator[row.operator].append((rank, row))
    rows = []
    for name, own in by_operator.items():
        rank, worst = max(own, key=lambda r: r[1].ratio)
        rows.append(
            Row(
                operator=name,
                calls=sum(row.calls for _, row in own),
                guilty=sum(row.guilty for _, row in own),
                ratio=worst.ratio,
                flops_share=sum(row.flops_share for _, row in own) / len(reports),
                rank=rank,
            )
        )
    return sorted(rows, key=lambda r: (-r.ratio if r.guilty else 0.0, -r.flops_share))


def _unjudged(by_rank: Sequence[list[Unjudged]]) -> list[Unjudged]:
    by_reason: dict[tuple[str, str], list[Unjudged]] = defaultdict(list)
    for not_judged in by_rank:
        for left in not_judged:
            by_reason[left.operator, left.reason].append(left)
    rows = [
        Unjudged(
            operator=operator,
            calls=sum(left.calls for left in own),
            flops_share=sum(left.flops_share for left in own) / len(by_rank),
            reason=reason,
        )
        for (operator, reason), own in by_reason.items()
    ]
    return sorted(rows, key=lambda u: (-u.flops_share, u.operator))
