"""Writes bench rows as one self-contained HTML file: a roofline for each dtype and peak, tables,
machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from glm_core.align.charts import Series, chart
from glm_core.align.report import save, table
from glm_core.bench.breakdown import PARTS
from glm_core.bench.compare import Comparison
from glm_core.measure.rows import Row

COLORS = ("#0b5cad", "#b00020", "#1b7837", "#7a5195", "#b8860b", "#555")


def write(rows: Sequence[Row], path: str | Path, comparison: Comparison | None = None) -> Path:
    """Writes the page and returns its path."""
    body = ["<h1>Bench</h1>"]
    body += [_verdicts(comparison)] if comparison else []
    body += [_roofline(name, group) for name, group in rooflines(rows).items()]
    body += [_parts(r) for r in rows if "parts_s" in r.figures]
    for bench in dict.fromkeys(r.bench for r in rows):
        body += [f"<h2>{escape(bench)}</h2>", _table([r for r in rows if r.bench == bench])]
    return save(path, "".join([*body, _machines(rows)]), "Bench")


def rooflines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Groups the rows that have a roof by it: dtype, peak and its source."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.roof_tflops:
            groups.setdefault(
                f"{row.dtype}: {row.peak['tflops'] * 1e3:.0f} GFLOP/s, {row.peak['gb_s']:.1f} GB/s,"
                f" {row.peak['source']}",
                [],
            ).append(row)
    return groups


def _roofline(name: str, rows: Sequence[Row]) -> str:
    """Draws GFLOP/s over FLOP for each byte, both logarithmic: the roof, and a dot for each row."""
    peak = rows[0].peak
    places = [r.flops / r.bytes for r in rows]
    knee = peak["tflops"] * 1e3 / peak["gb_s"]
    ends = [min(*places, knee / 10), knee, max(*places, knee * 10)]
    roof = [min(peak["tflops"] * 1e3, x * peak["gb_s"]) for x in ends]
    kinds: dict[str, list[Row]] = {}
    for r in rows:
        kinds.setdefault(f"{r.backend} {r.figures.get('direction', r.bench)}", []).append(r)
    dots = [
        Series(
            kind,
            [r.flops / r.bytes for r in group],
            [r.tflops * 1e3 for r in group],
            color,
            2.0,
            dots=True,
        )
        for (kind, group), color in zip(kinds.items(), COLORS * len(kinds), strict=False)
    ]
    figure = chart(
        f"Roofline, {name}",
        [Series("roof", ends, roof, width=2.0), *dots],
        x_label="FLOP a byte of compulsory traffic",
        y_label="GFLOP/s",
        log=True,
        log_x=True,
    )
    above = [r.key for r in rows if r.tflops > r.roof_tflops]
    note = (
        f"Above the roof, because their data stayed in a cache: {', '.join(above)}."
        if above
        else ""
    )
    return f"{figure}<p>{escape(note)}</p>"


def _parts(row: Row) -> str:
    seconds, f = row.figures["parts_s"], row.figures
    whole = sum(seconds.values())
    cells = [(p, f"{seconds[p] * 1e3:.2f}", f"{seconds[p] / whole:.1%}") for p in PARTS]
    facts = (
        f"{f['tokens_s']:.0f} tokens/s, MFU {f['mfu']:.1%}, HFU {f['hfu']:.1%}, memory "
        f"{f['memory_peak_bytes'] / 2**30:.2f} GiB ({f['memory_peak_of']})"
    )
    formulas = "".join(f"<p>{escape(text)}</p>" for text in f["formula"])
    head = f"<h2>{escape(row.key)}</h2><p>{escape(facts)}</p>{formulas}"
    return head + table(("where the time goes", "ms", "share"), cells)


def _table(rows: Sequence[Row]) -> str:
    head = (
        "what",
        "ms",
        "spread",
        "GFLOP/s",
        "GB/s",
        "of its roof",
        "peer",
        "times as fast as it",
        "notes",
    )
    return table(head, [cells(r) for r in rows])


def cells(row: Row) -> list[str]:
    """Formats a row: key, ms, spread, GFLOP/s, GB/s, share of the roof, peer, ratio, notes."""
    d: dict[str, Any] = row.to_json()["derived"]
    return [
        row.key,
        f"{d['median_ms']:.4g}",
        f"{d['spread']:.1%}",
        f"{row.tflops * 1e3:.4g}" if row.flops else "",
        f"{row.gb_s:.4g}" if row.bytes else "",
        f"{d['roof_share']:.1%}" if "roof_share" in d else "",
        row.peer,
        f"{d['times_faster_than_peer']:.3g}" if row.peer else "",
        "; ".join(row.notes),
    ]


def _verdicts(comparison: Comparison) -> str:
    rows = [
        (
            c.key,
            f"{c.ratio:.3f}",
            f"{c.low:.3f} to {c.high:.3f}",
            f'<span class="bad">{c.verdict}</span>' if c.verdict == "regression" else c.verdict,
        )
        for c in comparison.changes
    ]
    notes = "".join(f"<p>{escape(n)}</p>" for n in comparison.notes)
    head = ("what", f"{comparison.measure}, B / A", "interval", "verdict")
    return f"<h2>B against A</h2>{table(head, rows, markup={3})}{notes}"


def _machines(rows: Sequence[Row]) -> str:
    facts = dict.fromkeys((k, str(v)) for r in rows for k, v in r.machine.items())
    return "<h2>Measured on</h2>" + table(("fact", "value"), list(facts))
