"""Writes the verdict as one self-contained HTML file: curves in their envelope, deviations,
gradient errors, guilty ops and fallbacks."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glm_core.align import explanation, plan_findings
from glm_core.align.charts import Band, Series, chart
from glm_core.align.trace_format import per_million

if TYPE_CHECKING:
    from glm_core.align.jobs import RunResult
    from glm_core.align.trace import Trace
    from glm_core.align.verdict import Pair

ENOUGH_STEPS = 100
"""length of the runs that the verdict was measured with (docs/alignment.md)"""
SIZES = {
    "num_layers": "layers",
    "hidden": "width",
    "num_heads": "heads",
    "ffn": "feed-forward",
    "vocab": "vocabulary",
}
BLUE, RED, GREY = "#0b5cad", "#b00020", "#bbb"
STYLE = """
body{font:15px/1.45 Georgia,serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#000}
body{background:#fff}h1{font-size:1.5rem}
h2{border-top:2px solid #000;padding-top:.6rem;margin-top:2.5rem}
table{border-collapse:collapse;margin:.8rem 0;font-size:14px}
th{text-align:left;border-bottom:1px solid #000}
td,th{padding:.2rem .9rem .2rem 0;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1.2rem 0}figcaption{font-weight:bold}
svg{max-width:100%;height:auto}svg text{font:11px sans-serif}
.legend{font-size:13px;margin:0}
.legend i{display:inline-block;width:14px;height:8px;margin:0 5px 0 14px}
.bar{display:block;width:5rem;height:7px;border:1px solid #000}
.bar i{display:block;height:7px;background:#0b5cad}.bar i.over{background:#b00020}
.bad{color:#b00020;font-weight:bold}.good{font-weight:bold}
"""


def write(
    result: RunResult, path: str | Path, command: str = "", options: Sequence[str] | None = None
) -> Path:
    """Writes the report of an `align.run`; returns the path. command: the command line that made
    it; options: those of its words that describe the run (default: from the config)."""
    judged = [Judged(p, *_traces(result, p)) for p in result.pairs]
    return save(path, _page(judged, command, options))


def write_pair(
    pair: Pair, reference: Trace, candidate: Trace, path: str | Path, command: str = ""
) -> Path:
    """Writes the report of one comparison of two trace files; returns the path. command: the
    command line that made it."""
    return save(path, _page([Judged(pair, reference, candidate)], command))


class Judged(NamedTuple):
    """A verdict and the two traces it is about."""

    pair: Pair
    reference: Trace
    candidate: Trace


def _page(judged: Sequence[Judged], command: str, options: Sequence[str] | None = None) -> str:
    """Returns the outcome in one sentence, the table of all comparisons, what is wrong, how to read
    it, what was run, and the figures of each comparison."""
    pairs = [j.pair for j in judged]
    parts = [f"<h1>{_coloured(escape(explanation.headline(pairs)))}</h1>", _summary(judged)]
    parts += [_wrong(j, options) for j in judged if j.pair.reasons]
    if judged:
        parts.append(_run(judged[0].reference, command))
    return "".join(parts + [_pair(*j) for j in judged])


def _coloured(text: str) -> str:
    return re.sub(r"\b(aligned|diverged)\b", lambda m: _verdict(m[1]), text)


def _wrong(judged: Judged, options: Sequence[str] | None) -> str:
    """Returns what a reader needs who has to repair the candidate."""
    pair = judged.pair
    title = f"<h3>What is wrong: {escape(pair.candidate)}, {escape(pair.dtype)}</h3>"
    return title + table(("", ""), explanation.details(pair, judged.candidate, options))


def save(path: str | Path, body: str, title: str = "Alignment") -> Path:
    """Writes a self-contained page; returns the path."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _traces(result: RunResult, pair: Pair) -> tuple[Trace, Trace]:
    return (
        result.trace(pair.reference, pair.dtype),
        result.trace(pair.candidate, pair.dtype),
    )


def _verdict(word: str) -> str:
    return f'<span class="{"good" if word == "aligned" else "bad"}">{escape(word)}</span>'


def _summary(judged: Sequence[Judged]) -> str:
    rows = []
    for p, _, candidate in judged:
        shares = [_share(ratio) for ratio in explanation.shares(p, candidate)]
        rows.append((p.candidate, p.dtype, _verdict(p.verdict), *shares, p.first_step or "-"))
    head = ("candidate", "dtype", "verdict", "curve", "gradients", "ops", "first step outside")
    note = (
        "<p>Curve, gradients and ops: the largest deviation seen, as a share of what honest "
        "rounding explains. The bar is full at 1, the limit; a candidate with any share above 1 "
        "diverges. What is not judged has a dash.</p>"
    )
    return table(head, rows, markup={2, 3, 4, 5}) + note


def _share(ratio: float | None) -> str:
    """Returns a share as a number and a bar that is full at the limit."""
    if ratio is None:
        return "-"
    word = explanation.times(ratio) if ratio < 1e9 else "not finite"
    side = ' class="over"' if ratio > 1 else ""
    return f'{word}<b class="bar"><i{side} style="width:{min(max(ratio, 0), 1):.0%}"></i></b>'


def _run(reference: Trace, command: str) -> str:
    """Returns how to read the numbers, and what was run: model, training, controls, command."""
    steps, controls = len(reference.loss), len(reference.control_names)
    return _explanation(steps, controls) + "<h3>What was run</h3>" + _facts(reference, command)


def _explanation(steps: int, controls: int) -> str:
    """Returns a short text on the three numbers, and on what so many steps prove."""
    proof = (
        f"<strong>{steps} steps prove little about long training.</strong> A small error needs "
        "time to leave the envelope, and a fault that strikes rarely may not have struck yet. "
        "Gradients and ops are judged sharply all the same. "
        f"Train {ENOUGH_STEPS} steps or more before you rely on the curve."
        if steps < ENOUGH_STEPS
        else f"The curve covers {steps} steps; what comes later is not judged. Slower errors are "
        "left to gradients and ops."
    )
    if not controls:
        proof = (
            "<strong>The curve was not judged.</strong> What needs many steps to show, or struck "
            "between the captured steps, is not seen."
        )
    items = {
        "Curve": "not judged here."
        if not controls
        else f"the reference is trained {controls} more times with changes that alter "
        "nothing but rounding (control runs). The envelope is how far such runs may stray from its "
        "loss curve; the number is the candidate's largest distance from the curve, as a share of "
        "that. First step is the first one outside.",
        "Gradients": "at the captured steps the candidate gets the reference's weights and batch. "
        "The number is the largest error of a parameter's gradient, measured against float64.",
        "Ops": "every op call of these steps is repeated on the candidate alone. The number is the "
        "largest error that has a direction or a size as rounding does not have.",
    }
    listed = "".join(f"<li><strong>{k}</strong>: {text}</li>" for k, text in items.items())
    return f"<h3>How to read it</h3><ul>{listed}</ul><p>{proof}</p>"


def _facts(reference: Trace, command: str) -> str:
    """Returns a table of what was run; what is not known is left out."""
    model, data, train = (reference.config.get(k, {}) for k in ("model", "data", "train"))
    sizes = [f"{words} {model[k]:,}" for k, words in SIZES.items() if k in model]
    shape = [f"{k} {model[k]}" for k in ("placement", "activation", "positions") if k in model]
    steps = f"{len(reference.loss)} steps of {train.get('global_batch')} sequences of "
    rows = [
        ("model", ", ".join([*sizes, *shape])),
        ("training", f"{steps}{data.get('length')} tokens, seed {train.get('seed')}"),
        ("text", data.get("path", "")),
        ("control runs", ", ".join(reference.control_names)),
        ("captured", "".join(f"step {step} " for step in reference.capture_steps)),
        ("date", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        ("command", command),
    ]
    return table(("", ""), [row for row in rows if row[1] != ""])


def _pair(pair: Pair, reference: Trace, candidate: Trace) -> str:
    title = f"<h2>{escape(pair.candidate)}, {escape(pair.dtype)}: {_verdict(pair.verdict)}</h2>"
    parts = [title, _curves(pair, reference, candidate), _deviation(pair, reference)]
    parts += [_gradients(pair, candidate), _routing(candidate)]
    parts.append(
        _plan(candidate) if "plan" in candidate.environment else _findings(pair, candidate)
    )
    parts += [_fallbacks(candidate)]
    return "".join(parts) + _environments(reference, candidate)


def _curves(pair: Pair, reference: Trace, candidate: Trace) -> str:
    steps = range(1, len(reference.loss) + 1)
    # broad and light, so that a candidate on top of it does not hide it
    lines = [Series(pair.reference, steps, reference.loss, "#9a9a9a", 6.0)]
    if pair.envelope is None:
        return chart("Loss of the reference; the candidate made no training run of its own", lines)
    bound = pair.envelope.bound
    band = Band("envelope", steps, reference.loss - bound, reference.loss + bound, "#ddd")
    lines.append(Series(pair.candidate, steps, candidate.loss, BLUE))
    return chart("Loss", lines, [band], y_label="loss")


def _deviation(pair: Pair, reference: Trace) -> str:
    if pair.envelope is None:
        return ""
    steps = range(1, len(reference.loss) + 1)
    lines = [
        Series("" if i else "control runs", steps, abs(row - reference.loss), GREY, 1.0)
        for i, row in enumerate(reference.control_loss)
    ]
    lines.append(Series("bound", steps, pair.envelope.bound, RED, dash="5 3"))
    lines.append(Series(pair.candidate, steps, abs(pair.envelope.deviation), BLUE))
    title = "Distance from the reference's curve (0: the same bits)"
    return chart(title, lines, y_label="|loss difference|", log=True)


def _gradients(pair: Pair, candidate: Trace) -> str:
    excess = pair.gradient_excess
    if not excess.size:
        return "<p>Gradients were not judged.</p>"
    indices = range(1, excess.shape[1] + 1)
    colors = (BLUE, "#000", "#777") * len(excess)
    dots = [
        Series(f"step {step}", indices, row, color, dots=True)
        for step, row, color in zip(candidate.capture_steps, excess, colors, strict=False)
    ]
    limit = Series("bound", [1, excess.shape[1]], [1.0, 1.0], RED, dash="5 3")
    figure = chart(
        "Error of each parameter's gradient against float64, as a share of its bound",
        [*dots, limit],
        x_label="parameter",
        y_label="share",
        log=True,
    )
    worst = sorted(zip(excess.max(0), candidate.parameters, strict=True), reverse=True)[:5]
    rows = [(name, f"{share:.3f}") for share, name in worst]
    return figure + table(("largest errors", "share of the bound"), rows)


def _routing(candidate: Trace) -> str:
    if not candidate.routing:
        return ""
    rows = [
        (r["step"], r["layer"], r["rows"], f"{per_million(r):.2g}", r["seen"], r["wrong"])
        for r in candidate.routing
    ]
    expected = "flips expected per million tokens"
    head = ("step", "layer", "tokens", expected, "flips seen", "outside their margin")
    note = (
        "<p>A flip is a token that has other experts than in float64. Rounding may flip a token "
        "where two scores lie within it: inside the margin. Any other flip is wrong.</p>"
    )
    return "<h3>Choice of experts</h3>" + table(head, rows) + note


def _plan(candidate: Trace) -> str:
    """Returns what the ranks made of their gradients, the step furthest outside of each test."""
    note = "<p>Op calls are not judged again: a plan changes none of them.</p>"
    rows = plan_findings.rows(candidate)
    return (table(plan_findings.HEAD, rows) if rows else "") + note


def _findings(pair: Pair, candidate: Trace) -> str:
    if not pair.findings:
        return f"<p>{'No op is guilty' if candidate.num_tests else 'Ops were not judged'}.</p>"
    rows = [
        (
            f.op,
            f.direction,
            f.layer,
            f.step,
            f.tensor,
            "x".join(map(str, f.shape)),
            f.projection,
            f"{f.z:.1f}",
            f"{f.effect:.2e}",
            f"{f.benign:.2e}",
            f"{f.ratio:.2f}",
        )
        for f in pair.findings[:20]
    ]
    head = (
        "op",
        "direction",
        "layer",
        "step",
        "tensor",
        "shape",
        "statistic",
        "z",
        "effect",
        "benign up to",
        "ratio",
    )
    note = (
        "<p>The errors of these op results have a direction or a size that honest rounding does "
        "not explain. z is the effect in standard errors; ratio is the share of what is "
        "allowed.</p>"
    )
    return "<h3>Guilty ops</h3>" + table(head, rows) + note


def _fallbacks(candidate: Trace) -> str:
    if not candidate.fallbacks:
        return "<p>No op fell back to its reference.</p>"
    rows = [(f["op"], f["count"], f["reason"]) for f in candidate.fallbacks]
    return "<h3>Ops that ran their reference instead of a kernel</h3>" + table(
        ("op", "times", "why"), rows
    )


def _environments(reference: Trace, candidate: Trace) -> str:
    keys = sorted(set(reference.environment) | set(candidate.environment))
    rows = [
        (k, _one_line(reference.environment.get(k)), _one_line(candidate.environment.get(k)))
        for k in keys
    ]
    rows += [
        ("data order", reference.data_order[:16], candidate.data_order[:16]),
        ("initial weights", reference.initial_weights[:16], candidate.initial_weights[:16]),
        ("seconds", f"{reference.seconds:.1f}", f"{candidate.seconds:.1f}"),
    ]
    return "<h3>Environment</h3>" + table(("", reference.backend, candidate.backend), rows)


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return "" if value is None else str(value)


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], markup: set[int] | None = None
) -> str:
    """Returns an HTML table. Cells are escaped, except in the columns `markup`; numbers are aligned
    to the right."""
    cells = []
    for row in rows:
        line = []
        for i, value in enumerate(row):
            text = str(value)
            is_number = re.sub(r"[-.e+]", "", text).isdigit()
            cell = text if i in (markup or ()) else escape(text)
            line.append(f'<td class="n">{cell}</td>' if is_number else f"<td>{cell}</td>")
        cells.append(f"<tr>{''.join(line)}</tr>")
    names = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<table><tr>{names}</tr>{''.join(cells)}</table>"
