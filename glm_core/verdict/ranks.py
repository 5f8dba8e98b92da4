"""Makes one verdict on a job of those of its ranks."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable

from glm_core.distributed.reports import gathered, num_ranks
from glm_core.verdict.report import MAX_FINDINGS, Finding, Report, Row, Unjudged, from_json


def of_job(report: Report) -> Report | None:
    """Returns the verdict on all ranks on rank 0, None on the others; the report itself where there
    is no job. Every rank of a job has to call this."""
    if num_ranks() == 1:
        return report
    texts = gathered(json.dumps(report.to_json()))
    if texts is None:
        return None
    return merged({r: from_json(json.loads(t)) for r, t in enumerate(texts) if t}, len(texts))


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
        findings=_findings(reports),
        operators=_rows(reports),
        not_judged=_unjudged(reports.values()),
        num_tests=sum(report.num_tests for report in reports.values()),
        false_alarm_rate=sum(report.false_alarm_rate for report in reports.values()),
        seconds=max(report.seconds for report in reports.values()),
        peak_memory_bytes=max(report.peak_memory_bytes for report in reports.values()),
        notes=notes,
        ranks=[report.sentence() for report in reports.values()],
    )


def _findings(reports: dict[int, Report]) -> list[Finding]:
    """Returns each guilty operator at the rank where it is worst, the worst operator first."""
    by_operator: dict[str, list[tuple[int, Finding]]] = defaultdict(list)
    for rank, report in reports.items():
        for finding in report.findings:
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


def _unjudged(reports: Iterable[Report]) -> list[Unjudged]:
    reports = list(reports)
    by_reason: dict[tuple[str, str], list[Unjudged]] = defaultdict(list)
    for report in reports:
        for left in report.not_judged:
            by_reason[left.operator, left.reason].append(left)
    rows = [
        Unjudged(
            operator=operator,
            calls=sum(left.calls for left in own),
            flops_share=sum(left.flops_share for left in own) / len(reports),
            reason=reason,
        )
        for (operator, reason), own in by_reason.items()
    ]
    return sorted(rows, key=lambda u: (-u.flops_share, u.operator))
