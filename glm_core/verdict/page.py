"""Writes the verdict on a program as one self-contained HTML file: sentences, guilty operators,
loss curve, all operators, what was not judged."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from glm_core.align.charts import Band, Series, chart
from glm_core.align.report import BLUE, GREY, RED, save, table
from glm_core.verdict.envelope import CurveVerdict
from glm_core.verdict.outcome import Outcome
from glm_core.verdict.report import Finding, Report, Unjudged

HOW = (
    "<p>Every operator call of the captured steps was computed again in float64 on the host. "
    "The last column is its largest error as a share of what honest ways to compute the same call "
    "show: above 1 is wrong. One false-alarm rate holds for the whole run.</p>"
)


def write(outcome: Outcome, path: str | Path, command: str = "") -> Path:
    """Writes the page; returns the path. command: the command line that made it."""
    word = '<span class="good">honest</span>' if outcome.ok else '<span class="bad">wrong</span>'
    report, comparison = outcome.report, outcome.comparison
    parts = [f"<h1>{escape(report.program)}: {word}</h1>"]
    parts += [f"<p>{escape(text)}</p>" for text in outcome.sentences()]
    findings = [("", f) for f in report.findings]
    if comparison is not None:
        findings += [(side, f) for side, own in comparison.findings.items() for f in own]
    parts.append(_findings(findings))
    if outcome.curve is not None and not outcome.curve.missing:
        parts.append(_curve(outcome.curve))
    parts += [_operators(report), _left_out("What was not judged", report.not_judged)]
    if comparison is not None:
        parts.append(_left_out("What was not compared", comparison.not_compared))
    parts.append(_facts(report, command))
    return save(path, "".join(parts), f"Verdict on {report.program}")


def _findings(findings: Iterable[tuple[str, Finding]]) -> str:
    rows = [
        (
            f.operator,
            side,
            f.where(),
            f"{f.result} [{'x'.join(map(str, f.shape))}] {f.dtype}",
            f.test,
            f"{f.effect:.2e}" if f.effect < 1e30 else "-",
            f"{f.limit:.1e}",
            f.calls,
            ", ".join(map(str, f.ranks)) or "-",
        )
        for side, f in findings
    ]
    if not rows:
        return "<p>No operator is wrong.</p>"
    head = (
        "operator",
        "machine",
        "where",
        "result",
        "test",
        "effect",
        "benign up to",
        "calls",
        "ranks",
    )
    return "<h2>What is wrong</h2>" + table(head, rows)


def _curve(curve: CurveVerdict) -> str:
    steps = range(1, len(curve.loss) + 1)
    reference, bound = np.array(curve.reference), np.array(curve.bound)
    band = Band("envelope", steps, reference - bound, reference + bound, "#ddd")
    lines = [
        Series("reference", steps, reference, "#9a9a9a", 6.0),
        Series("this run", steps, curve.loss, BLUE),
    ]
    distances = [
        Series("" if i else "control runs", steps, abs(np.array(c) - reference), GREY, 1.0)
        for i, c in enumerate(curve.controls)
    ]
    distances.append(Series("bound", steps, bound, RED, dash="5 3"))
    distances.append(Series("this run", steps, abs(np.array(curve.loss) - reference), BLUE))
    title = "Distance from the reference's curve (0: the same bits)"
    return (
        "<h2>Loss curve</h2>"
        + chart("Loss", lines, [band], y_label="loss")
        + chart(title, distances, y_label="|loss difference|", log=True)
    )


def _operators(report: Report) -> str:
    rows = [
        (
            r.operator,
            r.calls,
            r.guilty,
            f"{100 * r.flops_share:.3g}",
            f"{r.ratio:.3g}",
            *([r.rank] if report.ranks else []),
        )
        for r in report.operators
    ]
    rank = ["rank"] if report.ranks else []
    head = ("operator", "calls", "wrong", "% of FLOPs", "share of what is allowed", *rank)
    return "<h2>All judged operators</h2>" + HOW + table(head, rows)


def _left_out(title: str, left: list[Unjudged]) -> str:
    if not left:
        return f"<h2>{title}</h2><p>Nothing was left out.</p>"
    rows = [(u.operator, u.calls, f"{100 * u.flops_share:.2g}", u.reason) for u in left]
    return f"<h2>{title}</h2>" + table(("operator", "calls", "% of FLOPs", "why"), rows)


def _facts(report: Report, command: str) -> str:
    rows = [
        ("program", report.program),
        ("devices", ", ".join(report.devices)),
        ("torch", report.torch),
        ("captured steps", ", ".join(map(str, report.steps))),
        ("tests", f"{report.num_tests:,}, false-alarm rate {report.false_alarm_rate:g}"),
        ("time and memory", f"{report.seconds:.1f} s, {report.peak_memory_bytes / 2**20:.0f} MiB"),
        ("date", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        ("command", command),
        *(("note", note) for note in report.notes),
        *(("alone", sentence) for sentence in report.ranks),
    ]
    return "<h2>What was run</h2>" + table(("", ""), [r for r in rows if r[1]])
