"""Plans which text goes into which sequence of an epoch, before anything random is masked.

A sequence has one kind, as in GLM-130B. With probability `gmask_prob` all its samples are [gMASK]
samples, as long as there is room; otherwise they are [MASK] or [sMASK] samples of at most length /
samples_per_sequence tokens. A sample holds text of one document; a longer document continues in
further samples. Nothing is left out."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from glm_core.config import DataConfig
from glm_core.data.infill import Infill, Kind

KINDS: tuple[Kind, ...] = ("gmask", "sentence", "token")
MIN_SLOT = 16
"""a [MASK] sample gets at least this much room, whatever samples_per_sequence says"""
MIN_SEGMENT = 8
"""a document is not cut to fill a gap with fewer tokens of text than this"""


@dataclasses.dataclass(frozen=True, slots=True)
class Epoch:
    """The sequences of one epoch, numbered from 0 in random order."""

    segments: NDArray[np.int64]
    """[segments, 3]: document, start and end within it"""
    first: list[int]
    """[sequences + 1]: index of each sequence's first segment"""
    kinds: list[Kind]
    order: list[int]
    """the i-th sequence of the epoch is the order[i]-th that was packed"""

    def __len__(self) -> int:
        return len(self.kinds)

    def sequence(self, number: int) -> tuple[Kind, NDArray[np.int64]]:
        """Returns the kind and the segments [n, 3] of a sequence."""
        at = self.order[number]
        return self.kinds[at], self.segments[self.first[at] : self.first[at + 1]]


class Packer:
    """Plans epochs as a pure function of the documents' lengths, the config, the seed and the
    epoch's number."""

    def __init__(
        self, lengths: Sequence[int], config: DataConfig, infill: Infill, seed: int
    ) -> None:
        self.lengths, self.config, self.seed = lengths, config, seed
        self.max_tokens: dict[Kind, list[int]] = {
            kind: [0] + [infill.max_tokens(kind, n) for n in range(1, config.length + 1)]
            for kind in KINDS
        }
        slot = min(config.length, max(config.length // config.samples_per_sequence, MIN_SLOT))
        self.slot: dict[Kind, int] = {"gmask": config.length, "sentence": slot, "token": slot}
        self.fits = {kind: fits(self.max_tokens[kind], config.length) for kind in KINDS}

    def epoch(self, number: int) -> Epoch:
        """Shuffles the documents, packs them one after another, and shuffles the sequences."""
        rng = Random(f"{self.seed} {number}")
        documents = list(range(len(self.lengths)))
        rng.shuffle(documents)
        segments: list[tuple[int, int, int]] = []
        first: list[int] = []
        kinds: list[Kind] = []
        room, kind = 0, KINDS[0]
        for document in documents:
            start, end = 0, self.lengths[document]
            while start < end:
                fit = self.fits[kind][min(room, self.slot[kind])]
                if fit < min(end - start, MIN_SEGMENT) and (not first or first[-1] < len(segments)):
                    first.append(len(segments))
                    kind, room = self.draw(rng.random()), self.config.length
                    kinds.append(kind)
                    continue
                taken = min(fit, end - start)
                segments.append((document, start, start + taken))
                start, room = start + taken, room - self.max_tokens[kind][taken]
        order = list(range(len(kinds)))
        rng.shuffle(order)
        return Epoch(np.array(segments), [*first, len(segments)], kinds, order)

    def draw(self, point: float) -> Kind:
        """Returns the kind that belongs to a point in [0, 1)."""
        if point < self.config.gmask_prob:
            return "gmask"
        return "sentence" if point < self.config.gmask_prob + self.config.sentence_prob else "token"


def fits(max_tokens: list[int], length: int) -> list[int]:
    """Returns for every room 0..length the most tokens of text whose sample fits in it."""
    return [bisect.bisect_right(max_tokens, room) - 1 for room in range(length + 1)]
