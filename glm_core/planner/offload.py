"""Predicts what a step costs when layers are fetched for it from disk or from main memory."""

from __future__ import annotations

from typing import NamedTuple

from glm_core.model.fit import gigabytes


class OffloadCost(NamedTuple):
    """What is fetched at every step, and how fast. A step is one token of each sequence, or a chunk
    of a prompt; its layers compute while others are fetched."""

    streamed: int
    """layers that are fetched"""
    num_layers: int
    num_bytes: int
    """bytes fetched at every step"""
    gb_s: float
    """bandwidth of the disk or of the link"""
    source: str
    """`disk` or `main memory`"""
    measured: bool
    """whether the bandwidth was measured now; else it was stated"""

    @property
    def step_s(self) -> float:
        """Returns the seconds of fetching: the least that a step takes."""
        return self.num_bytes / self.gb_s / 1e9

    def text(self, slots: int) -> str:
        """Returns the prediction in one line; slots: sequences that share a step."""
        rate = f"at most {1 / self.step_s:.3g} tokens/s a sequence"
        if slots > 1:
            rate += f", {slots / self.step_s:.3g} for {slots}"
        how = "measured" if self.measured else "as stated"
        return (
            f"offload: {self.streamed} of {self.num_layers} layers come from {self.source} at "
            f"every step: {gigabytes(self.num_bytes)} at {self.gb_s:.3g} GB/s ({how}) take "
            f"{self.step_s:.3g} s, so {rate}"
        )
