"""The same scripts under real DeepSpeed and under us, two processes with different data: losses,
gradient norms, learning rates and final weights.

float32: both sum the same few numbers in another order, so a result may differ by RATIO roundings.
bfloat16: DeepSpeed sums gradients over ranks in bfloat16, we in float32; a weight then may be
rounded to a neighbour, and 12 steps of Adam carry that on. The bound is BF16_RATIO roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runs import SCRIPTS
from torch import Tensor

RATIO, BF16_RATIO = 16, 6
KEYS = ("losses", "norms", "rates")


def allowed(script: str) -> float:
    """Largest relative difference."""
    if script.startswith("bf16"):
        return BF16_RATIO * torch.finfo(torch.bfloat16).eps
    return RATIO * torch.finfo(torch.float32).eps


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert mine.shape == theirs.shape
    if not len(theirs):
        return 0.0
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_changed(
    script: str, real: tuple[list[Any], Path], ours: tuple[list[Any], Path]
) -> None:
    for theirs, mine in zip(real[0], ours[0], strict=True):
        seen = {k: distance(mine[script][k], theirs[script][k]) for k in KEYS}
        for name, weight in theirs[script]["weights"].items():
            seen[name] = distance(mine[script]["weights"][name], weight)
        assert len(mine[script]["losses"]) >= 12
        far = {k: v for k, v in seen.items() if v > allowed(script)}
        assert not far, f"{script}: {far}, allowed {allowed(script):.1e}"


def test_ranks_see_different_data(ours: tuple[list[Any], Path]) -> None:
    first, second = (run["zero3"]["losses"] for run in ours[0])
    assert distance(first, second) > 1e-3


def test_goes_on_from_deepspeeds_checkpoint(
    real: tuple[list[Any], Path], ours: tuple[list[Any], Path]
) -> None:
    for theirs, mine in zip(real[0], ours[0], strict=True):
        for key in KEYS:
            half = theirs["resume"][key][6:]
            assert distance(mine["take_over"][key], half) <= allowed("resume"), key
