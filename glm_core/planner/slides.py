"""Recomputes the utilisation table of the GLM slides: days = 8 N T / (chips x peak x share), next
to the days claimed, and the peak that a chip must have for the claim to hold.

8 N T is the cost of full recomputation: 2 N for a token forward, twice, and 4 N backward. So the
share is one of hardware FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_core.planner.cluster import CHIPS

TOKENS = 300e9


@dataclasses.dataclass(frozen=True, slots=True)
class SlideRow:
    """A row of the slides' table."""

    system: str
    chip: str
    """the preset of ours that stands for it"""
    chips: int
    parameters_b: float
    """billions"""
    share: float
    """reached share of the peak, 0 to 1"""
    days_claimed: float


ROWS = (
    SlideRow("NVIDIA A100", "A100-40G", 768, 176, 0.4106, 50),
    SlideRow("Hygon DCU", "Hygon-DCU", 12000, 183, 0.3129, 64),
    SlideRow("Sunway", "Sunway-node", 8192, 173, 0.1839, 59),
    SlideRow("BMTrain on A100", "A100-40G", 768, 176, 0.33, 62),
)


def table() -> list[dict[str, Any]]:
    """Returns each row with `days` from the chip's peak and `implied_peak_tflops` from the days
    claimed."""
    rows = []
    for r in ROWS:
        flops = 8 * r.parameters_b * 1e9 * TOKENS
        peak = CHIPS[r.chip]["peak"]
        implied = flops / (r.chips * r.share * r.days_claimed * 86400)
        rows.append(
            dataclasses.asdict(r)
            | {
                "peak_tflops": peak / 1e12,
                "days": flops / (r.chips * peak * r.share) / 86400,
                "implied_peak_tflops": implied / 1e12,
                "peak_is_implied": "implied" in CHIPS[r.chip]["source"],
            }
        )
    return rows
