"""The tokenizer round-trips exactly, keeps text apart from special tokens, decodes any ids, and is
cached."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core.data import cache, tokenizer
from glm_core.data.corpus import Corpus
from glm_core.data.tokenizer import SPECIAL, Tokenizer
from glm_core.errors import DataError

DOCUMENTS = [
    "the cat sat on the mat.\n    the dog, too: 12 dogs!\n" * 9,
    "床前明月光，疑是地上霜。\n" * 9,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer(tokenizer.train(DOCUMENTS, 400))


def corpus(documents: list[str]) -> Corpus:
    return Corpus(documents, {}, {}, cache.digest(documents))


odd = (
    st.text()
    | st.text(alphabet=" \t\n\r\0\u2581\ufeff\u2047the猫𝄞")
    | st.sampled_from(["<eos>", "[MASK]", "<0x41>", "<unk>", " ⁇ ", "\ufffd", *DOCUMENTS])
)


@given(odd, odd)
@settings(max_examples=500, deadline=None)
def test_round_trip_also_joined(trained: Tokenizer, one: str, two: str) -> None:
    ids = trained.encode(one) + trained.encode(two)
    assert trained.decode(ids) == one + two
    assert not set(ids) & {getattr(trained, name) for name in [*SPECIAL, "unk"]}


@given(st.lists(st.integers(-5, 500)))
@settings(max_examples=500, deadline=None)
def test_any_ids_decode(trained: Tokenizer, ids: list[int]) -> None:
    text = trained.decode(ids)
    text.encode()
    if any(not 0 <= i < trained.vocab for i in ids):
        assert "\ufffd" in text


def test_special_tokens_are_found_by_name(trained: Tokenizer) -> None:
    ids = [getattr(trained, name) for name in SPECIAL]
    assert len(set(ids)) == len(SPECIAL) == 8
    assert [trained._processor.id_to_piece(i) for i in ids] == list(SPECIAL.values())
    assert trained.decode([trained.sop, *trained.encode("the cat"), trained.eop]) == "the cat"


def test_learned_pieces_shorten_the_text(trained: Tokenizer) -> None:
    for document in DOCUMENTS:
        assert len(trained.encode(document)) < len(document)
    assert trained.vocab <= 400


def test_sentence_ends(trained: Tokenizer) -> None:
    for text, ends in [(".", True), ("\n", True), ("。", True), ("！", False), ("t", False)]:
        assert trained.ends_sentence[trained.encode(text)].any() == ends, text


def test_training_is_deterministic(trained: Tokenizer) -> None:
    again = Tokenizer(tokenizer.train(DOCUMENTS, 400))
    assert again.model == trained.model
    assert again.sha256 == trained.sha256
    assert Tokenizer(tokenizer.train(DOCUMENTS[:1], 400)).sha256 != trained.sha256


def test_more_characters_than_the_vocabulary_holds() -> None:
    """The rare ones are left to the bytes."""
    text = "".join(map(chr, range(0x4E00, 0x5A00))) + "的是不" * 100
    made = Tokenizer(tokenizer.train([text], 300))
    assert made.decode(made.encode(text)) == text
    assert len(made.encode("的")) == 1
    assert len(made.encode("\u59ff")) == 3


def test_a_long_text_is_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TRAINING_CHARS", 1000)
    whole = [f"line {number} of many\n" * 3 for number in range(500)]
    kept = tokenizer.lines(whole, 400)
    assert 900 < sum(map(len, kept)) <= 1000
    assert {"line 0 of many", "line 499 of many"} <= set(kept) | {kept[-1], "line 499 of many"}
    assert kept[-1].startswith("line 49"), "to the end, not only the beginning"


def test_half_a_surrogate_pair_is_no_text(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^text: holds half a surrogate pair; pass valid Unicode$"):
        trained.encode("a\ud800b")


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    expected = "data.vocab=299: no room for bytes and special tokens; use at least 300"
    with pytest.raises(DataError) as error:
        tokenizer.train(DOCUMENTS, 299)
    assert str(error.value) == expected


def test_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenizer.load(corpus(DOCUMENTS), 400, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "train", lambda *_: pytest.fail("trained again"))
        assert tokenizer.load(corpus(DOCUMENTS), 400, tmp_path).model == first.model
    assert tokenizer.load(corpus(DOCUMENTS), 320, tmp_path).vocab <= 320 < first.vocab
    assert tokenizer.load(corpus(DOCUMENTS[1:]), 400, tmp_path).model != first.model


@pytest.mark.parametrize("content", [b"junk", b""])
def test_a_broken_cache_names_the_file(tmp_path: Path, content: bytes) -> None:
    tokenizer.load(corpus(DOCUMENTS), 400, tmp_path)
    (path,) = tmp_path.glob("*.model")
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read \(.*\); delete it$"):
        tokenizer.load(corpus(DOCUMENTS), 400, tmp_path)
