"""Batches keep their invariants: mask, packing, coverage, order, resuming and slicing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core.config import DataConfig
from glm_core.data.sampler import Batch, Sampler
from glm_core.errors import DataError

FIRST = 10
"""ids below are special; all tokens of the corpus differ, so a leak is a repetition"""
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
    sha256="t",
    ends_sentence=np.arange(100_000) % 7 == 0,
)
BLANKS = (TOKENIZER.gmask, TOKENIZER.smask, TOKENIZER.mask)
LENGTHS = [3, 400, 1, 60, 17, 90, 5, 5, 5, 200]


def sampler(
    lengths: list[int] = LENGTHS,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    corpus: str = "c",
    **fields: Any,
) -> Sampler:
    """Returns a sampler over documents of these lengths."""
    config = DataConfig(**{"length": 64, "gmask_prob": 0.4, "sentence_prob": 0.3} | fields)
    ids = np.arange(FIRST, FIRST + sum(lengths), dtype=np.int32)
    tokens = np.insert(ids, np.cumsum(lengths), TOKENIZER.eod)
    return Sampler(tokens, config, TOKENIZER, {"sha256": corpus}, seed, rank, world)


def rows(batch: Batch) -> list[list[int]]:
    return batch.tokens.tolist()


def dense(batch: Batch) -> torch.Tensor:
    """Returns the mask [B, L, L] bool: whether query i sees key j."""
    j = torch.arange(batch.tokens.shape[1])
    return (j >= batch.key_start[..., None]) & (j < batch.key_end[..., None])


def samples(batch: Batch, row: int) -> list[tuple[int, int, int]]:
    """Returns (start, sep, end) of a row's samples, derived from tokens and weights alone."""
    tokens, weight = batch.tokens[row].tolist(), batch.loss_weight[row].tolist()
    used = len(tokens) - tokens.count(TOKENIZER.pad)
    edges = [i for i in range(1, used) if weight[i] < weight[i - 1]]
    bounds = list(zip([0, *edges], [*edges, used], strict=True))
    return [(a, a + weight[a:b].index(1.0), b) for a, b in bounds]


settings_of = st.fixed_dictionaries(
    {
        "length": st.integers(16, 150),
        "gmask_prob": st.sampled_from([0.0, 0.5, 1.0]),
        "sentence_prob": st.sampled_from([0.0]),
        "mask_ratio": st.floats(0, 1),
        "min_gmask_ratio": st.floats(0, 1),
        "span_mean": st.floats(0.2, 20),
        "samples_per_sequence": st.integers(1, 6),
    }
) | st.just({"gmask_prob": 0.0, "sentence_prob": 1.0})
documents = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@given(documents, st.integers(), settings_of)
@settings(max_examples=120, deadline=None)
def test_mask_positions_and_weights_of_packed_samples(
    lengths: list[int], seed: int, fields: dict[str, Any]
) -> None:
    batch = sampler(lengths, seed, **fields).next(4)
    mask = dense(batch)
    size = batch.tokens.shape[1]
    for row in range(4):
        expected = torch.eye(size, dtype=torch.bool)
        weight = torch.zeros(size)
        for start, sep, end in samples(batch, row):
            seen = expected[start:end, start:end]
            seen[:] = torch.ones_like(seen).tril()
            seen[:, : sep - start] = True
            weight[sep:end] = 1
            assert batch.tokens[row, sep] == TOKENIZER.sop
            assert batch.positions[row, 0, start] == 0, "positions restart in every sample"
            assert batch.positions[row, 1, start:sep].tolist() == [0] * (sep - start)
            assert sum(int(t) in BLANKS for t in batch.tokens[row, start:sep]) == sum(
                int(t) == TOKENIZER.sop for t in batch.tokens[row, sep:end]
            )
        assert torch.equal(mask[row], expected)
        assert torch.equal(batch.loss_weight[row], weight)
        assert weight.sum() > 0


@given(documents, st.integers(), settings_of)
@settings(max_examples=120, deadline=None)
def test_no_target_is_visible_to_its_query(
    lengths: list[int], seed: int, fields: dict[str, Any]
) -> None:
    """All tokens differ, so a token to be predicted must not occur in what its query sees."""
    batch = sampler(lengths, seed, **fields).next(4)
    mask = dense(batch)
    for row, i in batch.loss_weight.nonzero().tolist():
        target = batch.labels[row, i]
        if target != TOKENIZER.eop:
            assert not (batch.tokens[row][mask[row, i]] == target).any()


@given(documents, st.integers(), settings_of)
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_the_corpus_once(lengths: list[int], seed: int, fields: dict[str, Any]) -> None:
    one = sampler(lengths, seed, **fields)
    seen: list[int] = []
    for _ in range(len(one._current)):
        batch = one.next(1)
        for start, sep, end in samples(batch, 0):
            seen += batch.tokens[0, start:sep].tolist() + batch.labels[0, sep:end].tolist()
    text = [token for token in seen if token >= FIRST]
    assert sorted(text) == list(range(FIRST, FIRST + sum(lengths)))


def test_generation_ends_where_its_document_does() -> None:
    """<eop> is predicted once per document, after its last token; never at a cut."""
    one = sampler(gmask_prob=1, sentence_prob=0)
    labels = torch.cat([one.next(1).labels[0] for _ in range(len(one._current))])
    before = labels[:-1][labels[1:] == TOKENIZER.eop] - FIRST
    ends = set((np.cumsum(LENGTHS) - 1).tolist())
    ends_of_several_tokens = {end for end, n in zip(sorted(ends), LENGTHS, strict=True) if n > 1}
    assert ends_of_several_tokens <= set(before.tolist())
    assert int((labels == TOKENIZER.eop).sum()) == len(LENGTHS)


def test_blanks_differ_by_seed_and_epoch() -> None:
    """A document that fills one sequence leaves nothing else to differ."""
    fields: Any = {"gmask_prob": 1, "sentence_prob": 0}
    one = sampler([60], **fields)
    assert len({tuple(rows(one.next(1))[0]) for _ in range(20)}) > 5
    assert len({tuple(rows(sampler([60], s, **fields).next(1))[0]) for s in range(20)}) > 5


def test_documents_meet_others_by_seed_and_epoch() -> None:
    """Which documents share a sequence is drawn anew, and is not the order of the corpus."""

    def together(epoch: int, seed: int) -> tuple[int, ...]:
        plan = sampler([5] * 40, seed, gmask_prob=1, sentence_prob=0)._packer.epoch(epoch)
        assert len(plan) > 1
        return tuple(plan.segments[: plan.first[1], 0].tolist())

    drawn = {together(0, 0), together(1, 0), together(0, 1)}
    assert len(drawn) == 3
    assert all(list(group) != sorted(group) for group in drawn)


def test_sequences_of_one_document_are_shuffled() -> None:
    one = sampler([5000], gmask_prob=1, sentence_prob=0)
    first = [row[0] for row in rows(one.next(len(one._current)))]
    assert first != sorted(first)


def test_the_mix_of_kinds_is_the_configs() -> None:
    """Each sequence has one kind; shares within five binomial standard deviations."""
    one = sampler([500] * 150, gmask_prob=0.6, sentence_prob=0.1)
    n = len(one._current)
    assert n > 1000
    tokens = one.next(n).tokens
    has = torch.stack([(tokens == blank).any(1) for blank in BLANKS]).double()  # [3, n]
    assert torch.equal(has.sum(0), torch.ones(n).double())
    for share, p in zip(has.sum(1).tolist(), (0.6, 0.1, 0.3), strict=True):
        assert abs(share - p * n) < 5 * math.sqrt(n * p * (1 - p))


def test_sequences_are_filled() -> None:
    """Only the reserve for spans, and rests too short to cut a text for, stay empty."""
    batch = sampler([5000], length=256).next(15)
    assert (batch.tokens != TOKENIZER.pad).float().mean() > 0.9


def test_mask_samples_are_packed_as_configured() -> None:
    batch = sampler([5000], length=256, gmask_prob=0, sentence_prob=0).next(10)
    assert all(len(samples(batch, row)) == 4 for row in range(10))
    assert all(end - start <= 64 for row in range(10) for start, _, end in samples(batch, row))


def test_same_seed_same_batches() -> None:
    one, two, other = sampler(seed=5), sampler(seed=5), sampler(seed=6)
    assert rows(one.next(8)) == rows(two.next(8))
    assert one.order_hash == two.order_hash
    other.next(8)
    assert other.order_hash != one.order_hash


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_neither_micro_batch_nor_start_changes_a_sequence(sizes: list[int], start: int) -> None:
    whole, parts = sampler(), sampler()
    assert rows(whole.next(sum(sizes))) == [row for s in sizes for row in rows(parts.next(s))]
    assert whole.order_hash == parts.order_hash
    ahead, skipped = sampler(), sampler()
    ahead.next(start + 1)
    skipped.skip(start)
    assert rows(skipped.next(2))[1] == rows(ahead.next(1))[0]
    assert skipped.order_hash != ahead.order_hash, "a skip shows in the hash"


def test_a_resumed_run_sees_what_it_would_have_seen() -> None:
    unbroken, broken = sampler(), sampler()
    for size in (3, 8, 40):  # the last passes an epoch's end
        unbroken.next(size)
        broken.next(size)
        state = json.loads(json.dumps(broken.state()))
        broken = sampler()
        broken.restore(state)
    one, two = unbroken.next(5), broken.next(5)
    for name in ("tokens", "labels", "loss_weight", "positions", "key_start", "key_end"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert unbroken.state() == broken.state()


def test_going_back_in_the_same_sampler() -> None:
    """Rolling back over an epoch's end gives the same sequences again."""
    one = sampler()
    start = one.state()
    before = rows(one.next(80))
    assert one._epoch > 0
    one.restore(start)
    assert rows(one.next(80)) == before


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_global_batch(world: int) -> None:
    """8 sequences a step, whatever the world size; 10 steps pass an epoch's end."""
    alone = sampler()
    ranks = [sampler(rank=r, world=world) for r in range(world)]
    for _ in range(10):
        expected = rows(alone.next(8))
        assert [row for r in ranks for row in rows(r.next(8 // world))] == expected
    assert {r.index for r in ranks} == {alone.index}


def test_dtypes_shapes_and_moving() -> None:
    batch = sampler().next(2).to("cpu")
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.key_start.dtype == batch.key_end.dtype == torch.int32
    assert batch.loss_weight.dtype == torch.float32
    assert batch.positions.shape == (2, 2, 64)
    assert batch.to("meta").tokens.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"seed": 1}, "saved with seed=1 (here 0)"),
        ({"corpus": "other"}, "saved with corpus='other' (here 'c')"),
        ({"length": 65}, "saved with length=65 (here 64)"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], differences: str) -> None:
    with pytest.raises(DataError) as error:
        sampler().restore(sampler(**change).state())
    assert str(error.value) == f"sampler state: {differences}; resume with the same data and seed"


@pytest.mark.parametrize("state", [{}, {"index": "1", "order_hash": "", "of": {}}, {"index": -1}])
def test_a_malformed_state_is_refused(state: dict[str, Any]) -> None:
    one = sampler()
    with pytest.raises(DataError, match="sampler state: malformed"):
        one.restore(state)
    assert one.index == 0


def test_another_path_to_the_same_text_may_resume() -> None:
    sampler(path="a").restore(sampler(path="b").state())


def test_a_batch_needs_no_tokenizer_package() -> None:
    code = "import sys, glm_core.data.sampler; assert 'sentencepiece' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
