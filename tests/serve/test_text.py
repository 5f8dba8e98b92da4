"""Text as it may be shown: whatever the tokens, joined it is the text before the stop that is
complete first."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from glm_core.pretrained.source import Message, Source
from glm_core.serve.text import TextStream


@example(text=" aa", stops=["a", " aa"], size=1, spoken=False)
@example(text=" aa", stops=["a", " aa"], size=3, spoken=False)
@example(text="  a b", stops=[], size=1, spoken=True)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab 你é🙂", max_size=40),
    stops=st.lists(st.text("ab 你", min_size=1, max_size=3), max_size=2),
    size=st.integers(1, 5),
    spoken=st.booleans(),
)
def test_pieces_join_to_the_text(
    source: Any, text: str, stops: list[str], size: int, spoken: bool
) -> None:
    ids = source.tokenizer.encode(text)
    stream, shown = TextStream(source.tokenizer.decode, stops, spoken), ""
    for i in range(0, len(ids), size):
        shown += stream.feed(ids[i : i + size])
        assert "\ufffd" not in shown
    shown += stream.feed([], last=True)
    ends = [(i + len(s), i) for s in stops if (i := text.find(s)) >= 0]
    whole = text[: min(ends, default=(0, len(text)))[1]]
    assert shown == (whole.lstrip() if spoken else whole)
    assert stream.stopped == bool(ends)


def test_bytes_that_are_no_text_come_out_at_the_end(source: Source) -> None:
    broken = source.tokenizer.encode("🚀")[:2]
    stream = TextStream(source.tokenizer.decode)
    assert stream.feed(broken) == ""
    assert stream.feed([], last=True) == source.tokenizer.decode(broken)


def test_rounds_of_a_conversation(source: Source) -> None:
    """The text ChatGLM-6B's chat makes of it."""
    said = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = source.chat([Message(*m) for m in said])
    t = source.tokenizer
    text = "Be brief.\n[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："
    assert list(prompt.tokens) == [*t.encode(text), t.gmask, t.sop]
    assert prompt.sep == len(prompt.tokens) - 1
    single = source.chat([Message("user", "say [MASK]")])
    assert list(single.tokens) == [*t.encode("say [MASK]"), t.gmask, t.sop]


@pytest.mark.parametrize("text", ["a [MASK] b", "a", "a[sMASK]"])
def test_completions_open_blanks(source: Source, text: str) -> None:
    prompt = source.complete(text)
    t = source.tokenizer
    assert prompt.tokens[-1] == t.sop
    assert len({t.mask, t.smask, t.gmask} & set(prompt.tokens)) == 1
