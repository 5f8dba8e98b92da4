"""Lays the head of a report out for verdict.png: `python verdict.py REPORT PAGE`. Nothing of the
report is changed: its title, its table and the first candidate's two charts, side by side."""

from __future__ import annotations

import re
import sys
from pathlib import Path

STYLE = """
body{max-width:none;margin:0;padding:.9rem 1.2rem}h1{margin:.2rem 0 .6rem}
.charts{display:flex;gap:1.5rem}.charts figure{flex:1;margin:.6rem 0 0}
svg text{font-size:15px}
"""


def main(report: str, page: str) -> None:
    """Writes the page."""
    html = Path(report).read_text(encoding="utf-8")
    [style] = re.findall(r"<style>.*?</style>", html, re.S)
    title, table = (re.findall(rf"<{t}>.*?</{t}>", html, re.S)[0] for t in ("h1", "table"))
    charts = "".join(re.findall(r"<figure>.*?</figure>", html, re.S)[:2])
    head = f'<!doctype html><meta charset="utf-8">{style}<style>{STYLE}</style>'
    body = f'{title}{table}<div class="charts">{charts}</div>'
    Path(page).write_text(head + body, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
