"""Renders a report as text, JUnit XML, GitHub annotations or one HTML page."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from xml.etree import ElementTree

from glm_core.conformance.report import OUTCOMES, Report, Result


def text(report: Report) -> str:
    """Renders text: outcomes per op, why cases are unsupported, and each failure with the command
    that reruns it."""
    lines = [_row(["op", *OUTCOMES])]
    lines += [_row([op, *map(str, counts)]) for op, counts in _table(report)]
    for reason, count in _reasons(report):
        lines.append(f"unsupported ({count}): {reason}")
    lines += [_measured(r) for r in report.results if r.measured]
    for r in report.failed:
        lines += [f"FAIL {r.id}", f"     {r.reason}", f"     {r.rerun}"]
    lines += [f"left out by --skip: {', '.join(report.left_out)}"] if report.left_out else []
    counts = ", ".join(f"{report.count(o)} {o}" for o in OUTCOMES)
    return "\n".join([*lines, f"backend {report.backend}: {counts}"])


def _row(cells: list[str]) -> str:
    return cells[0].ljust(24) + "".join(c.rjust(13) for c in cells[1:])


def _table(report: Report) -> list[tuple[str, list[int]]]:
    per_op: dict[str, Counter[str]] = defaultdict(Counter)
    for r in report.results:
        per_op[r.id.partition("-")[0]][r.outcome] += 1
    return [(op, [counts[o] for o in OUTCOMES]) for op, counts in sorted(per_op.items())]


def _reasons(report: Report) -> list[tuple[str, int]]:
    return Counter(r.reason for r in report.results if r.outcome == "unsupported").most_common()


def _measured(r: Result) -> str:
    figures = (
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.measured.items()
    )
    return f"{r.id}: {', '.join(figures)}"


def junit(report: Report) -> str:
    """Renders JUnit XML with one test case per case. Unsupported cases and known failures are
    skipped tests with their reason."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"conformance {report.backend}",
        tests=str(len(report.results)),
        failures=str(len(report.failed)),
        skipped=str(report.count("unsupported") + report.count("xfail")),
    )
    for r in report.results:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            name=r.id,
            classname=f"conformance.{report.backend}",
            time=f"{r.seconds:.3f}",
        )
        tag = {"fail": "failure", "unsupported": "skipped", "xfail": "skipped"}.get(r.outcome)
        if tag:
            ElementTree.SubElement(case, tag, message=_printable(r.reason)).text = r.rerun
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _printable(text: str) -> str:
    """Replaces control characters, which XML cannot hold, by spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def github(report: Report) -> str:
    """Renders one `::error` annotation per failure, with the command that reruns it."""
    lines = []
    for r in report.failed:
        title = _escaped(f"{report.backend}: {r.id}").replace(":", "%3A").replace(",", "%2C")
        lines.append(f"::error title={title}::" + _escaped(f"{r.reason}\n{r.rerun}"))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Escapes text as GitHub's workflow commands want it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


STYLE = """body{font:15px/1.45 sans-serif;color:#000;background:#fff;max-width:70em;margin:2em auto;
padding:0 1em}table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #000;
padding:.2em .6em;text-align:left;vertical-align:top}td.n{text-align:right}code{font-size:13px}
tr.fail td{font-weight:bold}"""


def page(report: Report) -> str:
    """Renders a self-contained HTML page, black on white: counts per op, failures, then every
    case."""
    counts = ", ".join(f"{report.count(o)} {o}" for o in OUTCOMES)
    counts += f"; left out: {', '.join(report.left_out)}" if report.left_out else ""
    body = [
        f"<h1>Conformance of backend {html.escape(report.backend)}</h1>",
        f"<p>{html.escape(counts)}.</p>",
        _html_table(["op", *OUTCOMES], [[op, *c] for op, c in _table(report)]),
        *_section("Failures", report.failed, lambda r: [r.id, r.reason, r.rerun]),
        "<h2>Why cases are unsupported</h2>" if _reasons(report) else "",
        _html_table(["reason", "cases"], _reasons(report)) if _reasons(report) else "",
        *_section("Cases", report.results, _case_cells),
        "<h2>Machine</h2>",
        _html_table(["fact", "value"], report.machine.items()),
    ]
    title = f"Conformance: {html.escape(report.backend)}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    lines = "\n".join(filter(None, body))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{lines}\n</body></html>\n'


def _case_cells(r: Result) -> list[object]:
    ratio = "" if r.error_ratio is None else f"{r.error_ratio:.3g}"
    return [r.id, r.outcome, ratio, r.reason or (_measured(r) if r.measured else "")]


def _section(
    title: str, results: Iterable[Result], cells: Callable[[Result], list[object]]
) -> list[str]:
    rows = [cells(r) for r in results]
    heads = (
        ["case", "reason", "rerun"]
        if title == "Failures"
        else ["case", "outcome", "ratio", "reason"]
    )
    return [f"<h2>{title}</h2>", _html_table(heads, rows)] if rows else []


def _html_table(heads: list[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    lines = [f"<table><tr>{head}</tr>"]
    for row in rows:
        cells = [
            f'<td class="n">{c}</td>' if isinstance(c, int) else f"<td>{html.escape(str(c))}</td>"
            for c in row
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])
