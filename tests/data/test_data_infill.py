"""Blank infilling keeps its invariants: nothing is lost, and positions and statistics are the
published ones."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core.config import DataConfig
from glm_core.data.infill import Infill, Sample

FIRST = 10
"""ids below are special"""
TOKENIZER: Any = SimpleNamespace(
    unk=0,
    mask=1,
    gmask=2,
    smask=3,
    eod=4,
    sop=5,
    eop=6,
    eos=7,
    pad=8,
    ends_sentence=np.arange(5000) % 7 == 0,
)
KINDS = ("gmask", "sentence", "token")
ratios = st.floats(0, 1)


def infill(gmask_continues: bool = False, **fields: Any) -> Infill:
    """An Infill over text ids FIRST, FIRST + 1, ..."""
    return Infill(DataConfig(**fields), TOKENIZER, gmask_continues)


def text(n: int) -> Any:
    """n different tokens, so that any two places in the text can be told apart."""
    return np.arange(FIRST, FIRST + n)


def spans_of(sample: Sample) -> list[tuple[list[int], list[int], Any]]:
    """B as (inputs, labels, positions [2, n]) per span."""
    starts = [*np.flatnonzero(sample.tokens == TOKENIZER.sop), len(sample.tokens)]
    return [
        (sample.tokens[a:b].tolist(), sample.labels[a:b].tolist(), sample.positions[:, a:b])
        for a, b in itertools.pairwise(starts)
    ]


def rebuilt(sample: Sample) -> list[int]:
    """The text again: every blank of A replaced by the labels of the span at its position."""
    at = {int(places[0, 0]): labels for _, labels, places in spans_of(sample)}
    whole: list[int] = []
    for token, place in zip(
        sample.tokens[: sample.sep], sample.positions[0, : sample.sep], strict=True
    ):
        blank = token in (TOKENIZER.mask, TOKENIZER.gmask, TOKENIZER.smask)
        whole += at.pop(int(place)) if blank else [int(token)]
    assert not at, "a span without a blank"
    return [token for token in whole if token not in (TOKENIZER.eop, TOKENIZER.eos)]


@given(
    st.sampled_from(KINDS),
    st.integers(1, 300),
    st.booleans(),
    st.integers(),
    ratios,
    ratios,
    st.floats(0.1, 50),
)
@settings(max_examples=300, deadline=None)
def test_a_sample_is_its_text_taken_apart(
    kind: Any, n: int, complete: bool, seed: int, ratio: float, least: float, mean: float
) -> None:
    maker = infill(mask_ratio=ratio, min_gmask_ratio=least, span_mean=mean)
    sample = maker.sample(kind, text(n), complete, Random(seed))
    assert rebuilt(sample) == text(n).tolist()
    assert len(sample.tokens) <= maker.max_tokens(kind, n)
    assert len(sample.labels) == len(sample.tokens) == sample.positions.shape[1]
    assert TOKENIZER.sop not in sample.tokens[: sample.sep]
    assert sample.tokens[sample.sep] == TOKENIZER.sop, "B begins where A ends"
    assert (sample.labels[: sample.sep] == TOKENIZER.pad).all()


@given(st.sampled_from(KINDS), st.integers(1, 300), st.booleans(), st.integers())
@settings(max_examples=200, deadline=None)
def test_labels_are_aligned_with_inputs(kind: Any, n: int, complete: bool, seed: int) -> None:
    sample = infill().sample(kind, text(n), complete, Random(seed))
    for inputs, labels, _ in spans_of(sample):
        assert inputs[1:] == labels[:-1]
        closed = kind != "gmask" or complete
        assert (labels[-1] == TOKENIZER.eop) == closed, "eop where the span ends, not at a cut"
        assert TOKENIZER.eop not in inputs


@given(st.sampled_from(KINDS), st.integers(1, 300), st.booleans(), st.integers())
@settings(max_examples=200, deadline=None)
def test_positions_do_not_show_how_long_a_blank_is(
    kind: Any, n: int, complete: bool, seed: int
) -> None:
    sample = infill().sample(kind, text(n), complete, Random(seed))
    a = sample.positions[:, : sample.sep]
    assert a[0].tolist() == list(range(sample.sep)), "A counts on over its blanks"
    assert not a[1].any()
    for _, labels, places in spans_of(sample):
        blank = places[0, 0]
        assert sample.tokens[blank] in (TOKENIZER.mask, TOKENIZER.gmask, TOKENIZER.smask)
        assert (places[0] == blank).all()
        assert places[1].tolist() == list(range(1, len(labels) + 1))


def test_the_papers_example_token_by_token() -> None:
    """Takes x3 and x5 x6 out of x1..x6 (arXiv 2103.10360, figure 2), for both orders of B."""
    x, t = text(6), TOKENIZER
    a = [x[0], x[1], t.mask, x[3], t.mask, t.eos]
    third = ([t.sop, x[2]], [x[2], t.eop], [2, 2], [1, 2])
    last = ([t.sop, x[4], x[5]], [x[4], x[5], t.eop], [4, 4, 4], [1, 2, 3])
    seen = set()
    for seed in range(20):
        sample = infill().blank(x, [(2, 3), (4, 6)], t.mask, Random(seed))
        order = (third, last) if sample.tokens[7] == x[2] else (last, third)
        seen.add(order[0] is third)
        assert sample.sep == 6
        assert sample.tokens.tolist() == a + order[0][0] + order[1][0]
        assert sample.labels[6:].tolist() == order[0][1] + order[1][1]
        assert sample.positions[0].tolist() == [0, 1, 2, 3, 4, 5, *order[0][2], *order[1][2]]
        assert sample.positions[1].tolist() == [0] * 6 + order[0][3] + order[1][3]
    assert seen == {True, False}, "the spans of B are shuffled"


@pytest.mark.parametrize(
    ("continues", "row"), [(False, [0, 1, 2, 2, 2, 2]), (True, [0, 1, 2, 3, 4, 5])]
)
def test_generation_token_by_token(continues: bool, row: list[int]) -> None:
    """Row 0 of what [gMASK] generates stays at the blank (GLM), or runs on (GLM-130B, which has one
    row)."""
    x, t = text(4), TOKENIZER
    cut = infill(continues).generate(x, 2, complete=False)
    assert cut.tokens.tolist() == [x[0], x[1], t.gmask, t.sop, x[2]]
    assert cut.labels[3:].tolist() == [x[2], x[3]]
    whole = infill(continues).generate(x, 2, complete=True)
    assert whole.tokens.tolist() == [x[0], x[1], t.gmask, t.sop, x[2], x[3]]
    assert whole.labels[3:].tolist() == [x[2], x[3], t.eop]
    assert whole.positions.tolist() == [row, [0, 0, 0, 1, 2, 3]]


@given(st.integers(1, 400), st.integers(), ratios, st.floats(0.1, 50))
@settings(max_examples=300, deadline=None)
def test_token_spans_never_touch(n: int, seed: int, ratio: float, mean: float) -> None:
    spans = infill(mask_ratio=ratio, span_mean=mean).token_spans(n, Random(seed))
    assert spans
    assert spans[0][0] >= 0
    assert spans[-1][1] <= n
    assert all(start < end for start, end in spans)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


@given(st.integers(1, 400), st.integers())
@settings(max_examples=200, deadline=None)
def test_sentence_spans_are_whole_sentences(n: int, seed: int) -> None:
    x = text(n)
    spans = infill().sentence_spans(x, Random(seed))
    edges = {0, n, *(i + 1 for i in range(n) if TOKENIZER.ends_sentence[x[i]])}
    assert all(start in edges and end in edges for start, end in spans)
    assert all(not TOKENIZER.ends_sentence[x[start : end - 1]].any() for start, end in spans)
    taken = sum(end - start for start, end in spans)
    assert taken >= infill().budget(n)
    assert taken - max(end - start for start, end in spans) < infill().budget(n), (
        "no more than needed"
    )


def test_span_lengths_are_poisson_and_cover_fifteen_percent() -> None:
    """Lengths are drawn until the budget is full, so their number K is a stopping time. Wald: of K
    lengths the sum has mean m*K and variance K*s^2, the count of length l mean p*K and variance
    K*p*(1-p); the overshoot of the budget has mean (m2/m - 1) / 2 (renewal theory). Bounds: five
    standard deviations, so a false alarm about once in 10^5 runs of this test."""
    maker, n, rounds = infill(), 1000, 2000
    assert maker.span_mean == pytest.approx(3 / (1 - math.exp(-3)))
    rng = Random(0)
    drawn = [[b - a for a, b in maker.token_spans(n, rng)] for _ in range(rounds)]
    counts = Counter(itertools.chain(*drawn))
    k = sum(counts.values())
    total = sum(length * count for length, count in counts.items())
    assert abs(total - maker.span_mean * k) < 5 * maker.span_deviation * math.sqrt(k)
    for length, p in enumerate(maker.span_weights, 1):
        truth = math.exp(-3) * 3**length / math.factorial(length) / (1 - math.exp(-3))
        assert p == pytest.approx(truth, rel=1e-6)
        assert abs(counts[length] - p * k) < 5 * math.sqrt(k * p * (1 - p)) + 1
    over = np.array([sum(lengths) for lengths in drawn]) - int(0.15 * n)
    assert over.min() >= 0
    expected = ((maker.span_deviation**2 + maker.span_mean**2) / maker.span_mean - 1) / 2
    assert abs(over.mean() - expected) < 5 * over.std() / math.sqrt(rounds)


def test_every_sentence_is_taken_as_often_as_any_other() -> None:
    """10 sentences of 7 tokens, two taken: each with probability 1/5, within five deviations."""
    maker, rng, rounds = infill(), Random(4), 2000
    x = np.arange(15, 85)  # multiples of 7 end a sentence
    assert (np.flatnonzero(TOKENIZER.ends_sentence[x]) % 7 == 6).all()
    counts = Counter(start for _ in range(rounds) for start, _ in maker.sentence_spans(x, rng))
    assert set(counts) == set(range(0, 70, 7))
    assert all(abs(c - rounds / 5) < 5 * math.sqrt(rounds * 0.16) for c in counts.values())


def test_span_places_are_uniform() -> None:
    """One span of 1 in 10 tokens: each place with probability 1/10, within five deviations."""
    maker, rng, rounds = infill(mask_ratio=0.1, span_mean=1e-3), Random(1), 10_000
    counts = Counter(maker.token_spans(10, rng)[0][0] for _ in range(rounds))
    assert all(abs(counts[i] - rounds / 10) < 5 * math.sqrt(rounds * 0.09) for i in range(10))


def test_generated_share_is_uniform_from_the_least() -> None:
    """Lengths 20..99 of 100 tokens: all occur, none other, mean within five deviations."""
    maker, rng = infill(), Random(2)
    got = [100 - maker.sample("gmask", text(100), False, rng).sep + 1 for _ in range(4000)]
    assert set(got) == set(range(20, 100))
    assert abs(np.mean(got) - 59.5) < 5 * math.sqrt((80**2 - 1) / 12 / len(got))


def test_the_same_rng_gives_the_same_sample() -> None:
    one, two, other = (infill().sample("token", text(200), True, Random(s)) for s in (3, 3, 4))
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.tokens.tolist() != other.tokens.tolist()
