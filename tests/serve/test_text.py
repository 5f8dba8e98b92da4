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
