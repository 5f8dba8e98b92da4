"""The utilisation table of the GLM slides, recomputed: days from days = 8 N T / (chips peak share),
beside the days claimed, and the peak a chip must have for the claim to hold.

8 N T is what full recomputation costs: 2 N a token forward, twice, and 4 N backward, so the share
is one of hardware FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_core.planner.cluster import CHIPS

TOKENS = 300e9


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """As the slides have it."""

    system: str
    chip: str
    """our preset"""
    chips: int
    parameters_b: float
    share: float
    days_claimed: float


ROWS = (
    Row("NVIDIA A100", "A100-40G", 768, 176, 0.4106, 50),
    Row("Hygon DCU", "Hygon-DCU", 12000, 183, 0.3129, 64),
    Row("Sunway", "Sunway-node", 8192, 173, 0.1839, 59),
    Row("BMTrain on A100", "A100-40G", 768, 176, 0.33, 62),
)


def table() -> list[dict[str, Any]]:
    """Each row with `days` from the chip's peak and `implied_peak_tflops` from the days claimed."""
    found = []
    for r in ROWS:
        work = 8 * r.parameters_b * 1e9 * TOKENS
        peak = CHIPS[r.chip]["peak"]
        implied = work / (r.chips * r.share * r.days_claimed * 86400)
        found.append(
            dataclasses.asdict(r)
            | {
                "peak_tflops": peak / 1e12,
                "days": work / (r.chips * peak * r.share) / 86400,
                "implied_peak_tflops": implied / 1e12,
                "peak_is_implied": "implied" in CHIPS[r.chip]["source"],
            }
        )
    return found
