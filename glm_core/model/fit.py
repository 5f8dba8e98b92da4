"""Decides how many sequences of how many tokens a cache holds, and how many layers stay in memory,
from the bytes that are free; refuses what cannot fit before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from glm_core.config import ModelConfig
from glm_core.errors import ConfigError

SHARE = 0.9
"""of the free bytes is used; the rest is for activations and for what others take meanwhile"""
BUFFERS = 2
"""layers in memory at a time for those that are streamed: one computes, the next is read"""
LEAST = 1024
"""tokens of a slot below which a context that nobody chose is refused"""
ENOUGH = 8192
"""tokens of a slot that come before further slots, and before further layers in memory"""
STEP = 64
"""a chosen context is a multiple of it"""


class Sizes(NamedTuple):
    """Bytes of a model as it computes."""

    ends: int
    """everything outside of the layers: embedding, head, final norm, tables of positions"""
    layer: int
    """the largest layer"""
    num_layers: int
    token: int
    """keys and values of one token in all layers"""

    @property
    def weights(self) -> int:
        """Returns the bytes of the whole model."""
        return self.ends + self.num_layers * self.layer

    def least(self, offload: bool) -> int:
        """Returns the bytes of the weights that must be in memory at a time."""
        return self.ends + self.layer * min(self.num_layers, BUFFERS if offload else 1 << 30)


def token_bytes(config: ModelConfig, value_bytes: int, further: int = 0) -> int:
    """Returns the cache's bytes for one token of one sequence. further: layers of multi-token
    prediction that keep keys and values too."""
    c = config
    return c.cache_parts * (c.num_layers + further) * c.key_heads * c.key_dim * value_bytes


class Fit(NamedTuple):
    """What is put into memory."""

    slots: int
    context: int
    """tokens of a slot, prompt and reply together"""
    resident: int
    """layers that stay in memory; the others are streamed"""


def fit(
    sizes: Sizes,
    free_bytes: int | None,
    longest: int,
    *,
    slots: int | None = None,
    context: int | None = None,
    most_slots: int = 1,
    offload: bool = False,
    ways: Mapping[str, Sizes] | None = None,
) -> Fit:
    """Returns slots and context as requested, or else as many as fit, up to `most_slots` and
    `longest`: first slots of ENOUGH tokens, then longer ones. offload: layers that do not fit
    beside the cache are streamed. free_bytes: None if it is not known; then nothing is refused.

    Raises ConfigError where it cannot fit, with the bytes that are missing and the ways out.
    ways: sizes of the model under other options, by what to do for them."""
    longest = min(context or longest, longest)
    if free_bytes is None:
        return Fit(slots or most_slots, longest, sizes.num_layers)
    usable = int(free_bytes * SHARE)
    tokens = max(usable - sizes.least(offload), 0) // sizes.token
    if offload and context is None:
        longest = min(longest, ENOUGH)
    each = longest if context else min(longest, ENOUGH)
    slots = slots or max(min(most_slots, tokens // each), 1)
    if context is None:
        room = tokens // slots
        room -= room % STEP if room > STEP else 0
        longest = min(longest, max(room, LEAST))
    missing = sizes.least(offload) + slots * longest * sizes.token - usable
    if missing > 0:
        raise ConfigError(_refusal(sizes, free_bytes, slots, longest, tokens, offload, ways or {}))
    left = usable - sizes.ends - slots * longest * sizes.token
    resident = sizes.num_layers
    if left < resident * sizes.layer:
        resident = left // sizes.layer - BUFFERS
    return Fit(slots, longest, resident)


def _refusal(
    sizes: Sizes,
    free_bytes: int,
    slots: int,
    context: int,
    tokens: int,
    offload: bool,
    ways: Mapping[str, Sizes],
) -> str:
    weights, cache = sizes.least(offload), slots * context * sizes.token
    usable = int(free_bytes * SHARE)
    advice = []
    if slots > 1 and tokens >= context:
        advice.append(f"--slots {tokens // context}")
    if tokens // slots >= 2:
        advice.append(f"--context {min(tokens // slots, context)}")
    smaller = {what: other.least(offload) for what, other in ways.items()}
    if not offload:
        smaller["--offload"] = sizes.least(True)
    advice += [
        f"{what} (weights {gigabytes(size)})"
        for what, size in smaller.items()
        if size < weights and size + min(context, STEP) * sizes.token <= usable
    ]
    kind = f"{BUFFERS} layers, embedding and head" if offload else "the weights"
    return (
        f"memory: {kind} take {gigabytes(weights)} and a cache of {slots} x {context} tokens "
        f"{gigabytes(cache)}, but of {gigabytes(free_bytes)} free only {gigabytes(usable)} may be "
        f"used: {gigabytes(weights + cache - usable)} are missing; "
        f"use {', or '.join(advice) or 'a smaller model'}"
    )


def gigabytes(count: float) -> str:
    """Returns bytes as text, 18.9 GB, or 1.2 MB where it is little."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
