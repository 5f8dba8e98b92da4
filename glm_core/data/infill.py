"""Builds training samples by autoregressive blank infilling (GLM, arXiv 2103.10360; GLM-130B, arXiv
2210.02414).

A sample is part A, the text with blanks, followed by part B, the spans that were taken out. Every
token sees all of A; a token of B sees only the tokens of B before it. Inputs and labels are aligned
(no shift): B's inputs are <sop> + span, its labels span + <eop>. Positions are [2, n]: row 0 is the
place in A (all of a span stands at its blank); row 1 counts 1, 2, ... inside each span of B and is
0 on A. All randomness comes from the `random.Random` argument."""

from __future__ import annotations

import dataclasses
import itertools
import math
from random import Random
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glm_core.config import DataConfig

if TYPE_CHECKING:
    from glm_core.data.tokenizer import Tokenizer  # at run time this needs no sentencepiece

Kind = Literal["gmask", "sentence", "token"]
Ids: TypeAlias = NDArray[np.int64]
Span = tuple[int, int]
"""[start, end) in the text"""
MAX_SPAN = 39
"""longest token span; GLM draws lengths from 1 to 39"""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One corrupted text: n tokens, A then B."""

    tokens: Ids
    """the inputs [n]"""
    labels: Ids
    """[n]: what each input of B predicts; pad on A"""
    positions: Ids
    """[2, n]"""
    sep: int
    """number of tokens of A"""


class Infill:
    """Builds samples of the three kinds, and bounds their lengths."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, gmask_continues: bool) -> None:
        """gmask_continues: row 0 runs on through what [gMASK] generates, as in GLM-130B, which has
        one row. Otherwise it stays at the blank, as in GLM and ChatGLM-6B, where row 1 counts."""
        self.config = config
        self.tokenizer = tokenizer
        self.gmask_continues = gmask_continues
        lengths = np.arange(1, MAX_SPAN + 1)
        log = lengths * math.log(config.span_mean) - [math.lgamma(k + 1) for k in lengths]
        weights = np.exp(log - log.max())
        self.span_weights: list[float] = (weights / weights.sum()).tolist()
        """P(1..MAX_SPAN): the Poisson distribution with mean `config.span_mean`, cut to this
        range"""
        self.span_mean = float(lengths @ self.span_weights)
        self.span_deviation = math.sqrt(float((lengths - self.span_mean) ** 2 @ self.span_weights))

    def budget(self, n: int) -> int:
        """Returns the least number of n tokens that [MASK] and [sMASK] spans take together; at
        least one, so that there is a loss."""
        return max(1, int(self.config.mask_ratio * n))

    def max_spans(self, n: int) -> int:
        """Returns the most spans that n tokens may have: three standard deviations above the mean
        number that fills the budget, but no more than the budget has tokens."""
        mean = self.budget(n) / self.span_mean
        spread = self.span_deviation / self.span_mean * math.sqrt(mean)
        return min(self.budget(n), math.ceil(mean + 3 * spread) + 1)

    def max_tokens(self, kind: Kind, n: int) -> int:
        """Returns the most tokens that a sample of n tokens of text can have: two more per span
        (blank, <sop>), and <eos>."""
        return n + 2 if kind == "gmask" else n + 2 * self.max_spans(n) + 1

    def sample(self, kind: Kind, text: Ids, complete: bool, rng: Random) -> Sample:
        """Returns a sample of at most `max_tokens(kind, len(text))` tokens. complete: the text ends
        where its document does."""
        if kind == "gmask":
            least = max(1, int(self.config.min_gmask_ratio * len(text)))
            length = rng.randint(least, max(least, len(text) - 1))
            return self.generate(text, len(text) - length, complete)
        if kind == "sentence":
            return self.blank(text, self.sentence_spans(text, rng), self.tokenizer.smask, rng)
        return self.blank(text, self.token_spans(len(text), rng), self.tokenizer.mask, rng)

    def token_spans(self, n: int, rng: Random) -> list[Span]:
        """Returns spans of Poisson length that cover at least `budget` of n tokens, at least one
        token apart, in text order. A length that no longer fits is cut (only in texts of a few
        tokens)."""
        lengths: list[int] = []
        while sum(lengths) < self.budget(n) and len(lengths) < self.max_spans(n):
            if (left := n - sum(lengths) - len(lengths)) < 1:
                break
            (length,) = rng.choices(range(1, MAX_SPAN + 1), self.span_weights)
            lengths.append(min(length, left))
        rng.shuffle(lengths)
        free = n - sum(lengths) - len(lengths) + 1
        spans, offset = [], 0
        for place, length in zip(
            sorted(rng.randrange(free + 1) for _ in lengths), lengths, strict=True
        ):
            spans.append((offset + place, offset + place + length))
            offset += length + 1
        return spans

    def sentence_spans(self, text: Ids, rng: Random) -> list[Span]:
        """Returns random whole sentences that cover at least `budget` of the text, in text
        order."""
        ends = (np.flatnonzero(self.tokenizer.ends_sentence[text]) + 1).tolist()
        edges = sorted({0, *ends, len(text)})
        sentences = list(itertools.pairwise(edges))
        rng.shuffle(sentences)
        taken = 0
        for count, (start, end) in enumerate(sentences, 1):
            taken += end - start
            if taken >= self.budget(len(text)) or count == self.max_spans(len(text)):
                break
        return sorted(sentences[:count])

    def blank(self, text: Ids, spans: list[Span], mask: int, rng: Random) -> Sample:
        """Returns a sample whose A is the text with `mask` in place of each span, then <eos>, and
        whose B is the spans in random order."""
        token = self.tokenizer
        place = np.ones(len(text) + 1, np.int64)
        for start, end in spans:
            place[start + 1 : end] = 0
        place = np.cumsum(place) - 1
        source = np.append(text, token.eos)
        kept = np.diff(place, prepend=-1) > 0
        source[[start for start, _ in spans]] = mask
        a, a_place = source[kept], place[kept]
        order = rng.sample(spans, len(spans))
        inputs = [part for start, end in order for part in ([token.sop], text[start:end])]
        labels = [part for start, end in order for part in (text[start:end], [token.eop])]
        rows = [
            np.stack([np.full(end - start + 1, place[start]), np.arange(1, end - start + 2)])
            for start, end in order
        ]
        return self.join(
            a, np.concatenate(inputs), np.concatenate(labels), a_place, np.hstack(rows)
        )

    def generate(self, text: Ids, prefix: int, complete: bool) -> Sample:
        """Returns a sample whose A is the first `prefix` tokens and [gMASK], and whose B is the
        rest, with <eop> only if the document ends there."""
        token = self.tokenizer
        target = np.append(text[prefix:], token.eop) if complete else text[prefix:]
        count = np.arange(1, len(target) + 1)
        row = prefix + count if self.gmask_continues else np.full_like(count, prefix)
        a = np.append(text[:prefix], token.gmask)
        inputs = np.append([token.sop], target[:-1])
        return self.join(a, inputs, target, np.arange(prefix + 1), np.stack([row, count]))

    def join(self, a: Ids, inputs: Ids, labels: Ids, a_place: Ids, b_positions: Ids) -> Sample:
        """Returns A and B as one sample."""
        a_positions = np.stack([a_place, np.zeros_like(a_place)])
        return Sample(
            np.append(a, inputs),
            np.append(np.full_like(a, self.tokenizer.pad), labels),
            np.hstack([a_positions, b_positions]),
            len(a),
        )
