"""Which text goes into which sequence of an epoch: known before anything random is masked.

A sequence has one kind, as in GLM-130B: with probability `gmask_prob` all its samples are [gMASK]
samples, as long as there is room; otherwise they are [MASK] or [sMASK] samples of at most length /
samples_per_sequence tokens. A sample is text of one document; a document that is longer goes on in
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
"""a [MASK] sample is given at least this room, whatever samples_per_sequence says"""
MIN_PIECE = 8
"""a document is not cut to fill a gap of fewer tokens of text than this"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One epoch; its sequences are numbered from 0, in random order."""

    pieces: NDArray[np.int64]
    """[pieces, 3]: document, start, end within it"""
    first: list[int]
    """[sequences + 1]: where each sequence's pieces begin"""
    kinds: list[Kind]
    order: list[int]
    """the i-th sequence of the epoch is the order[i]-th that was packed"""

    def __len__(self) -> int:
        return len(self.kinds)

    def sequence(self, number: int) -> tuple[Kind, NDArray[np.int64]]:
        """Kind and pieces [n, 3] of a sequence."""
        at = self.order[number]
        return self.kinds[at], self.pieces[self.first[at] : self.first[at + 1]]


class Packer:
    """Plans epochs: a pure function of the documents' lengths, the config, the seed and the
    epoch."""

    def __init__(
        self, lengths: Sequence[int], config: DataConfig, infill: Infill, seed: int
    ) -> None:
        self.lengths, self.config, self.seed = lengths, config, seed
        self.need: dict[Kind, list[int]] = {
            kind: [0] + [infill.need(kind, n) for n in range(1, config.length + 1)]
            for kind in KINDS
        }
        slot = min(config.length, max(config.length // config.samples_per_sequence, MIN_SLOT))
        self.slot: dict[Kind, int] = {"gmask": config.length, "sentence": slot, "token": slot}
        self.fits = {kind: fits(self.need[kind], config.length) for kind in KINDS}

    def epoch(self, number: int) -> Plan:
        """Shuffles the documents, packs them one after another, and shuffles the sequences."""
        rng = Random(f"{self.seed} {number}")
        documents = list(range(len(self.lengths)))
        rng.shuffle(documents)
        pieces: list[tuple[int, int, int]] = []
        first: list[int] = []
        kinds: list[Kind] = []
        room, kind = 0, KINDS[0]
        for document in documents:
            start, end = 0, self.lengths[document]
            while start < end:
                fit = self.fits[kind][min(room, self.slot[kind])]
                if fit < min(end - start, MIN_PIECE) and (not first or first[-1] < len(pieces)):
                    first.append(len(pieces))
                    kind, room = self.draw(rng.random()), self.config.length
                    kinds.append(kind)
                    continue
                taken = min(fit, end - start)
                pieces.append((document, start, start + taken))
                start, room = start + taken, room - self.need[kind][taken]
        order = list(range(len(kinds)))
        rng.shuffle(order)
        return Plan(np.array(pieces), [*first, len(pieces)], kinds, order)

    def draw(self, point: float) -> Kind:
        """The kind at a point in [0, 1)."""
        if point < self.config.gmask_prob:
            return "gmask"
        return "sentence" if point < self.config.gmask_prob + self.config.sentence_prob else "token"


def fits(need: list[int], length: int) -> list[int]:
    """For every room 0..length the most tokens of text whose need is no larger."""
    return [bisect.bisect_right(need, room) - 1 for room in range(length + 1)]
