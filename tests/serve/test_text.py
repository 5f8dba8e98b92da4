"""The pieces of text of a detokenizer, joined, are the text before the stop string that is complete
first, however many tokens come at once; and the prompts of a blank-filling model."""

from __future__ import annotations

import io
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from glm_core.errors import PromptError
from glm_core.model.sample import Sampling
from glm_core.pretrained.chat_model import BlankFillingModel
from glm_core.pretrained.templates import Message
from glm_core.serve import terminal
from glm_core.serve.detokenizer import Detokenizer

tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


@example(text=" aa", stops=["a", " aa"], size=1, strip_start=False)
@example(text=" aa", stops=["a", " aa"], size=3, strip_start=False)
@example(text="  a b", stops=[], size=1, strip_start=True)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab 你é🙂", max_size=40),
    stops=st.lists(st.text("ab 你", min_size=1, max_size=3), max_size=2),
    size=st.integers(1, 5),
    strip_start=st.booleans(),
)
def test_pieces_join_to_the_text(
    chat_model: Any, text: str, stops: list[str], size: int, strip_start: bool
) -> None:
    ids = chat_model.tokenizer.encode(text)
    stream, shown = Detokenizer(chat_model.tokenizer.decode, stops, strip_start), ""
    for i in range(0, len(ids), size):
        shown += stream.feed(ids[i : i + size])
        assert "\ufffd" not in shown
    shown += stream.feed([], last=True)
    ends = [(i + len(s), i) for s in stops if (i := text.find(s)) >= 0]
    whole = text[: min(ends, default=(0, len(text)))[1]]
    assert shown == (whole.lstrip() if strip_start else whole)
    assert stream.stopped == bool(ends)


def test_bytes_that_are_no_text_come_out_at_the_end(chat_model: BlankFillingModel) -> None:
    broken = chat_model.tokenizer.encode("🚀")[:2]
    stream = Detokenizer(chat_model.tokenizer.decode)
    assert stream.feed(broken) == ""
    assert stream.feed([], last=True) == chat_model.tokenizer.decode(broken)


HA = "哈".encode()
RANKS = [*(bytes([b]) for b in range(256)), HA[:2], HA[2:] + HA[:2], HA[1:] + HA[:1], HA * 2]
"""a byte-level vocabulary with tokens that end inside a character"""


@pytest.mark.parametrize("kind", ["tiktoken", "byte-level", "byte-fallback"])
@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(RANKS) - 1), max_size=12),
    pieces=st.lists(st.sampled_from(["哈", "é", "a ", "🚀"]), max_size=6),
    size=st.integers(1, 5),
)
@example(ids=[256, 257, 257, 257, 257, HA[2]], pieces=[], size=1)
@example(ids=[HA[0], *[258] * 6, HA[1], HA[2], ord("a")], pieces=[], size=1)
def test_characters_split_over_any_number_of_tokens(
    kind: str, ids: list[int], pieces: list[str], size: int
) -> None:
    """What is streamed is what the tokenizer decodes as a whole, where the bytes are text."""
    ids = [*ids, *"".join(pieces).encode()]
    if kind == "byte-fallback":
        ids = [b for i in ids for b in RANKS[i]]
    decode, whole = DECODERS[kind], b"".join(RANKS[i] for i in ids)
    try:
        text = whole.decode()
    except UnicodeDecodeError:
        text = ""
    stream, shown = Detokenizer(decode), ""
    for i in range(0, len(ids), size):
        shown += stream.feed(ids[i : i + size])
    shown += stream.feed([], last=True)
    if text or kind != "byte-fallback":  # its tokenizer gives a wrong run one mark a byte
        assert shown == whole.decode(errors="replace")
    assert len(stream._ids) <= len(ids)


def test_what_is_decoded_again_stays_short() -> None:
    stream = Detokenizer(DECODERS["tiktoken"])
    for _ in range(100):
        assert stream.feed([HA[0], 258, HA[1], HA[2]]) == "哈哈"
        assert len(stream._ids) <= 8


def _decoders() -> dict[str, Any]:
    """Returns `decode` of GLM-4's tiktoken file, and of tokenizers' two ways to hold bytes."""
    encoding = tiktoken.Encoding(
        "x", pat_str=".", mergeable_ranks={t: i for i, t in enumerate(RANKS)}, special_tokens={}
    )
    symbols = bytes_to_symbols()
    vocab = {"".join(symbols[b] for b in token): i for i, token in enumerate(RANKS)}
    level = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    level.decoder = tokenizers.decoders.ByteLevel()
    fallback = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[])
    )
    fallback.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return {
        "tiktoken": lambda ids: encoding.decode_bytes(list(ids)).decode(errors="replace"),
        "byte-level": level.decode,
        "byte-fallback": fallback.decode,
    }


def bytes_to_symbols() -> dict[int, str]:
    """Returns GPT-2's printable character of every byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


DECODERS = _decoders()


def test_rounds_of_a_conversation(chat_model: BlankFillingModel) -> None:
    """The prompt is that of ChatGLM-6B's chat."""
    messages = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = chat_model.chat_prompt([Message(*m) for m in messages])
    t = chat_model.tokenizer
    text = "Be brief.\n[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："
    assert list(prompt.tokens) == [*t.encode(text), t.gmask, t.sop]
    assert prompt.sep == len(prompt.tokens) - 1
    single = chat_model.chat_prompt([Message("user", "say [MASK]")])
    assert list(single.tokens) == [*t.encode("say [MASK]"), t.gmask, t.sop]


@pytest.mark.parametrize("text", ["a [MASK] b", "a", "a[sMASK]"])
def test_completions_open_blanks(chat_model: BlankFillingModel, text: str) -> None:
    prompt = chat_model.completion_prompt(text)
    t = chat_model.tokenizer
    assert prompt.tokens[-1] == t.sop
    assert len({t.mask, t.smask, t.gmask} & set(prompt.tokens)) == 1


def test_a_refused_question_leaves_the_conversation(
    chat_model: BlankFillingModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What the chat format refuses is printed and forgotten; what came before is kept."""
    real, seen = BlankFillingModel.chat_prompt, []

    def picky(self: BlankFillingModel, messages: list[Message]) -> Any:
        seen.append([m.content for m in messages if m.role == "user"])
        if messages[-1].content == "bad":
            raise PromptError("chat template: no bad words; give others")
        return real(self, messages)

    monkeypatch.setattr(BlankFillingModel, "chat_prompt", picky)
    lines = io.StringIO("a\nbad\nb\n")
    terminal.chat(chat_model, Sampling(max_tokens=2), lines, io.StringIO())
    assert seen == [["a"], ["a", "bad"], ["a", "b"]]
    assert capsys.readouterr().err == "glm-core: chat template: no bad words; give others\n"
