"""Renders the verdict on a program as text, JUnit XML or SARIF. The HTML page is in `page`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from glm_core.verdict.comparison import Comparison
from glm_core.verdict.envelope import CurveVerdict
from glm_core.verdict.report import Finding, Report

ROWS = 25
"""the table shows at most so many operators; JSON has them all"""
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def text(
    report: Report, comparison: Comparison | None = None, sentences: Sequence[str] = ()
) -> str:
    """Renders text: the verdict in a sentence (or in these), the guilty operators, the table of the
    operators with the most FLOPs, and what was not judged."""
    lines = [*(sentences or [report.sentence()]), *(f"WRONG {f}" for f in report.findings)]
    if comparison is not None:
        lines += [f"WRONG {s}: {f}" for s, own in comparison.findings.items() for f in own]
    guilty = {f.operator for f in report.findings}
    rows = [r for i, r in enumerate(report.operators) if i < ROWS or r.operator in guilty]
    head = ("operator", "calls", "wrong", "of allowed", "% of FLOPs")
    lines.append(_row(*head, *(["rank"] if report.ranks else [])))
    for r in rows:
        rank = [r.rank] if report.ranks else []
        cells = (r.calls, r.guilty, f"{r.ratio:.3g}", f"{100 * r.flops_share:.3g}", *rank)
        lines.append(_row(r.operator, *cells))
    if len(rows) < len(report.operators):
        lines.append(f"and {len(report.operators) - len(rows)} more; --json has them")
    lines += [
        f"not judged: {u.operator}, {u.calls} calls, {100 * u.flops_share:.2g} % of the FLOPs: "
        f"{u.reason}"
        for u in report.not_judged
    ]
    if comparison is not None:
        left = comparison.not_compared
        lines += [f"not compared: {u.operator}, {u.calls} calls: {u.reason}" for u in left]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"alone: {sentence}" for sentence in report.ranks]
    size = report.peak_memory_bytes / 2**20
    lines.append(f"captured steps: {report.seconds:.1f} s, {size:.0f} MiB at most")
    return "\n".join(lines)


def _row(name: str, *cells: object) -> str:
    return name.ljust(56) + "".join(str(c).rjust(12) for c in cells)


def junit(
    report: Report, comparison: Comparison | None = None, curve: CurveVerdict | None = None
) -> str:
    """Renders JUnit XML with one test case per operator, one per operator that differs between two
    machines, and one for the loss curve. What was not judged is a skipped test with its reason."""
    suite = ElementTree.Element("testsuite", name=f"verdict {report.program}")
    kind = f"verdict.{'.'.join(report.devices) or 'none'}"
    wrong = {f.operator: str(f) for f in report.findings}
    for row in report.operators:
        _case(suite, kind, row.operator, wrong.get(row.operator))
    for left in report.not_judged:
        _case(suite, kind, left.operator, skipped=left.reason)
    if comparison is not None:
        for side, own in comparison.findings.items():
            for f in own:
                _case(suite, f"verdict.against.{side}", f.operator, str(f))
        for name in comparison.only_there:
            _case(suite, "verdict.against.there", name, "judged wrong there as it ran")
        if comparison.ok:
            _case(suite, "verdict.against", "all recorded calls")
        for left in comparison.not_compared:
            _case(suite, "verdict.against", left.operator, skipped=left.reason)
    if curve is not None:
        failed = None if curve.ok else curve.sentence()
        _case(suite, "verdict.curve", "loss curve", failed, curve.missing or None)
    for name, kinds in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(name, str(len(list(suite.iter(kinds)))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _case(
    suite: ElementTree.Element,
    kind: str,
    name: str,
    failed: str | None = None,
    skipped: str | None = None,
) -> None:
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=kind)
    for element, message in (("failure", failed), ("skipped", skipped)):
        if message is not None:
            ElementTree.SubElement(case, element, message=message)


def sarif(report: Report, comparison: Comparison | None = None) -> str:
    """Renders SARIF 2.1.0 with one result per guilty operator, at the line that called it."""
    found = [(f, "") for f in report.findings]
    if comparison is not None:
        found += [(f, f"{side}: ") for side, own in comparison.findings.items() for f in own]
    names = sorted({f.operator for f, _ in found})
    driver = {
        "name": "glm-core verdict",
        "rules": [{"id": n, "shortDescription": {"text": f"{n} is computed wrong"}} for n in names],
    }
    run = {"tool": {"driver": driver}, "results": [_result(*f) for f in found]}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(finding: Finding, before: str) -> dict[str, Any]:
    file, _, number = finding.line.rpartition(":")
    path = Path(file)
    near = path.is_relative_to(os.getcwd())
    uri = path.relative_to(os.getcwd()).as_posix() if near else path.as_posix()
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": max(int(number or 1), 1)}}
    return {
        "ruleId": finding.operator,
        "level": "error",
        "message": {"text": before + str(finding)},
        "locations": [{"physicalLocation": place}],
    }
