"""Renders the verdict on a program as text, JUnit XML or SARIF."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from glm_core.verdict.report import Finding, Report

ROWS = 25
"""the table shows at most so many operators; JSON has them all"""
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def text(report: Report) -> str:
    """Renders text: the verdict in a sentence, the guilty operators, the table of the operators
    with the most FLOPs, and what was not judged."""
    lines = [report.sentence(), *(f"WRONG {f}" for f in report.findings)]
    guilty = {f.operator for f in report.findings}
    rows = [r for i, r in enumerate(report.operators) if i < ROWS or r.operator in guilty]
    lines.append(_row("operator", "calls", "wrong", "of allowed", "% of FLOPs"))
    lines += [
        _row(r.operator, r.calls, r.guilty, f"{r.ratio:.3g}", f"{100 * r.flops_share:.3g}")
        for r in rows
    ]
    if len(rows) < len(report.operators):
        lines.append(f"and {len(report.operators) - len(rows)} more; --json has them")
    lines += [
        f"not judged: {u.operator}, {u.calls} calls, {100 * u.flops_share:.2g} % of the FLOPs: "
        f"{u.reason}"
        for u in report.not_judged
    ]
    lines += [f"note: {note}" for note in report.notes]
    size = report.peak_memory_bytes / 2**20
    lines.append(f"captured steps: {report.seconds:.1f} s, {size:.0f} MiB at most")
    return "\n".join(lines)


def _row(name: str, *cells: object) -> str:
    return name.ljust(56) + "".join(str(c).rjust(12) for c in cells)


def junit(report: Report) -> str:
    """Renders JUnit XML with one test case per operator. Those that were not judged are skipped
    tests with their reason."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"verdict {report.program}",
        tests=str(len(report.operators) + len(report.not_judged)),
        failures=str(len(report.findings)),
        skipped=str(len(report.not_judged)),
    )
    wrong = {f.operator: f for f in report.findings}
    for row in report.operators:
        case = _case(suite, row.operator, report)
        if row.operator in wrong:
            ElementTree.SubElement(case, "failure", message=str(wrong[row.operator]))
    for left in report.not_judged:
        case = _case(suite, left.operator, report)
        ElementTree.SubElement(case, "skipped", message=left.reason)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _case(suite: ElementTree.Element, name: str, report: Report) -> ElementTree.Element:
    kind = f"verdict.{'.'.join(report.devices) or 'none'}"
    return ElementTree.SubElement(suite, "testcase", name=name, classname=kind)


def sarif(report: Report) -> str:
    """Renders SARIF 2.1.0 with one result per guilty operator, at the line that called it."""
    names = sorted({f.operator for f in report.findings})
    driver = {
        "name": "glm-core verdict",
        "rules": [{"id": n, "shortDescription": {"text": f"{n} is computed wrong"}} for n in names],
    }
    run = {"tool": {"driver": driver}, "results": [_result(f) for f in report.findings]}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(finding: Finding) -> dict[str, Any]:
    file, _, number = finding.line.rpartition(":")
    path = Path(file)
    near = path.is_relative_to(os.getcwd())
    uri = path.relative_to(os.getcwd()).as_posix() if near else path.as_posix()
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": max(int(number or 1), 1)}}
    return {
        "ruleId": finding.operator,
        "level": "error",
        "message": {"text": str(finding)},
        "locations": [{"physicalLocation": place}],
    }
