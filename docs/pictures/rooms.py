"""Draws rooms.svg, the picture of the rooms in the README: `python docs/pictures/rooms.py`.

The order is that of CHAIN in tests/shared/rooms.py, from the bottom left to the top right. A test
holds that the committed file is what this draws."""

from __future__ import annotations

import sys
import textwrap
from html import escape
from pathlib import Path

FLOORS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "the ground",
        "#5b6472",
        {
            "errors": "every error of ours",
            "versions": "what torch and Python changed",
            "environment": "GLM_CORE_* variables",
            "config": "what a run is",
        },
    ),
    (
        "what an op is",
        "#0b5cad",
        {
            "choice": "how choices are judged",
            "spec": "reference, samples, cost",
            "decode_step": "a model as data",
            "session": "fallbacks and why",
            "dispatch": "who runs an op",
            "ops": "the twenty ops",
        },
    ),
    (
        "how it runs",
        "#00796b",
        {
            "backends": "one folder per accelerator",
            "measure": "how a figure is taken",
            "diagnose": "lost devices, hangs, NaN",
        },
    ),
    (
        "the model and its life",
        "#6a4c93",
        {
            "data": "text to batches",
            "model": "the one GLM",
            "training": "steps and checkpoints",
            "export": "ONNX files",
            "distributed": "many processes",
            "pretrained": "published weights",
        },
    ),
    (
        "the judgement",
        "#b00020",
        {
            "faults": "wrong and benign kernels",
            "conformance": "is a kernel right?",
            "align": "are two loss curves the same?",
            "sensitivity": "how sharp is the verdict?",
            "rollout": "do sampler and trainer agree?",
            "verdict": "any PyTorch program",
        },
    ),
    (
        "what it is used for",
        "#9a5b00",
        {
            "planner": "memory and time on a cluster",
            "serve": "chat, and OpenAI's API",
            "deepspeed": "scripts written for DeepSpeed",
        },
    ),
    (
        "at the top",
        "#2d3748",
        {
            "bench": "speed, beside that of others",
            "doctor": "one backend, examined",
            "cli": "one module per command",
        },
    ),
)
"""(name, colour, rooms with what each holds), the lowest floor first"""

WIDTH, FLOOR, GAP, LABEL, EDGE, TOP, FOOT = 800, 62, 6, 138, 14, 44, 34
SANS = "font-family='Segoe UI,Helvetica,Arial,sans-serif'"


def draw() -> str:
    """Returns the picture as SVG, on a white card, so that dark pages show it too."""
    height = TOP + len(FLOORS) * (FLOOR + GAP) + FOOT
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"viewBox='0 0 {WIDTH} {height}' {SANS} role='img'>",
        "<title>The rooms of glm_core</title>",
        f"<rect width='{WIDTH}' height='{height}' rx='10' fill='#fff'/>",
        text(EDGE, 28, "The rooms of glm_core", 17, "#111", bold=True),
    ]
    for i, (name, color, rooms) in enumerate(reversed(FLOORS)):
        parts += floor(TOP + i * (FLOOR + GAP), name, color, rooms)
    note = "A room imports only from the floors below it, and from the rooms to its left."
    parts.append(text(EDGE, height - 13, note, 13, "#444"))
    return "\n".join([*parts, "</svg>", ""])


def floor(y: int, name: str, color: str, rooms: dict[str, str]) -> list[str]:
    """Returns one floor: its name at the left, then its rooms in equal parts."""
    parts = []
    for j, line in enumerate(lines := textwrap.wrap(name, 16)):
        middle = y + FLOOR / 2 + 5 + 17 * (j - (len(lines) - 1) / 2)
        parts.append(text(EDGE, middle, line, 13.5, color, bold=True))
    left, width = LABEL, (WIDTH - EDGE - LABEL + GAP) / len(rooms)
    for j, (room, holds) in enumerate(rooms.items()):
        x = left + j * width
        parts.append(
            f"<rect x='{x:.1f}' y='{y}' width='{width - GAP:.1f}' height='{FLOOR}' rx='5' "
            f"fill='{color}' fill-opacity='0.09' stroke='{color}' stroke-opacity='0.55'/>"
        )
        parts.append(text(x + 8, y + 20, room, 14, color, bold=True))
        for k, line in enumerate(textwrap.wrap(holds, int((width - GAP - 12) / 5.7))):
            parts.append(text(x + 8, y + 37 + 14 * k, line, 12, "#333"))
    return parts


def text(x: float, y: float, words: str, size: float, color: str, *, bold: bool = False) -> str:
    """Returns one line of text."""
    weight = " font-weight='600'" if bold else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{color}'{weight}>"
        f"{escape(words)}</text>"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
    print(f"wrote {Path(__file__).with_suffix('.svg')}", file=sys.stderr)
