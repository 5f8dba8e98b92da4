"""Predicts what a step costs when layers are fetched for it from disk or from main memory."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from glm_core.config import ModelConfig
from glm_core.errors import ConfigError
from glm_core.model.fit import Sizes, fit, gigabytes, token_bytes
from glm_core.model.quantize import VALUE_BYTES, Quantization, device_memory

CACHED = "the system's cache of the disk"
"""the source of layers on disk, after the first step, where memory is free for all of them"""


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
    """`disk`, `main memory`, or CACHED"""
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


def on_one_card(
    config: ModelConfig, quantization: Quantization, card_bytes: int, length: int, link_gb_s: float
) -> OffloadCost | None:
    """Returns what one sequence of `length` tokens costs on one card, with the layers that do not
    fit kept in main memory; None where even two layers, embedding and head do not fit."""
    one, two = (
        device_memory(dataclasses.replace(config, num_layers=n), quantization, 1, length).weights
        for n in (1, 2)
    )
    layer, count = two - one, config.num_layers
    sizes = Sizes(one - layer, layer, count, token_bytes(config, VALUE_BYTES))
    try:
        found = fit(sizes, card_bytes, length, slots=1, context=length, offload=True)
    except ConfigError:
        return None
    streamed = count - found.resident
    return OffloadCost(streamed, count, streamed * layer, link_gb_s, "main memory", False)
