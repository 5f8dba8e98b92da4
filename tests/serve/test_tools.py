"""Tool calls and thoughts, with the openai client and replies that are given, not drawn."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm_core.config import ModelConfig
from glm_core.model import generate
from glm_core.model.glm import GLM
from glm_core.pretrained.chat_model import CausalModel
from glm_core.pretrained.templates import ChatTemplate
from glm_core.pretrained.tokenizers import FastTokenizer
from glm_core.serve.parts import Splitter, Tools, parse_call

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai's client is not installed")

TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}\n## {{ tool.function.name }}\n"
    "{{ tool.function | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]").replace(
    "<|assistant|>{% endif %}", "<|assistant|>\n<think>{% endif %}"
)
CALL = 'roots\n{"coefficients": [1, 0, -2]}'
TOOL = {"type": "function", "function": {"name": "roots", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Which numbers have the square 2?"}


@pytest.fixture
def say(
    chat_tokenizer: FastTokenizer, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Returns a function that starts a server whose model gives these replies, each ended by its
    own stop token, and returns a client and the prompts that came."""
    config = ModelConfig(
        num_layers=1, hidden=32, num_heads=2, ffn=32, vocab=352, max_length=1024, placement="pre"
    )
    stop = tuple(
        chat_tokenizer.special[n] for n in ("<|endoftext|>", "<|user|>", "<|observation|>")
    )
    with contextlib.ExitStack() as stack:

        def start(*replies: str, template: str = TEMPLATE) -> tuple[Any, list[str]]:
            tokens = [
                token
                for text in replies
                for token in (*chat_tokenizer.encode(text), stop[2 if text == CALL else 1])
            ]
            monkeypatch.setattr(generate, "choose", lambda *_: [tokens.pop(0)])
            network = GLM(config).requires_grad_(False)
            for parameter in network.parameters():
                parameter.fill_(0.02)  # any finite value: what it says is given
            model = CausalModel(
                model=network,
                tokenizer=chat_tokenizer,
                name="glm-4-9b-chat",
                stop=stop,
                template=ChatTemplate(source=template),
            )
            prompts, ids = [], ChatTemplate.prompt_ids

            def kept(*args: Any) -> list[int]:
                prompt = ids(*args)
                prompts.append(chat_tokenizer._tokenizer.decode(prompt, skip_special_tokens=False))
                return prompt

            monkeypatch.setattr(ChatTemplate, "prompt_ids", kept)
            served = stack.enter_context(serving(model=model, slots=1))
            url = f"{served.url}/v1"
            return stack.enter_context(openai.OpenAI(base_url=url, api_key="none")), prompts

        yield start


def test_the_example_of_the_docs(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """SymPy computes what the model asks for; the model sees tool, call and result in its form."""
    client, prompts = say(CALL, "They are the two roots.")
    docs = Path(__file__).parents[2] / "docs/generation.md"
    [code] = re.findall(r"```python\n(import json\n.*?)```", docs.read_text("utf-8"), re.DOTALL)
    code = code.replace("http://127.0.0.1:8000/v1", str(client.base_url))
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out == "They are the two roots.\n"
    names["client"].close()
    assert "<|system|>## roots" in prompts[0]
    assert '"description": "highest power first"' in prompts[0]
    assert prompts[0].endswith(f"<|user|>\n{USER['content']}<|assistant|>")
    called = f"<|assistant|>{CALL}<|observation|>\n['-sqrt(2)', 'sqrt(2)']<|assistant|>"
    assert prompts[1].endswith(called.replace("'", ""))


def test_a_streamed_call(say: Any) -> None:
    """The call comes whole, never as text; a reply that only begins like one is text."""
    client, _ = say(CALL, "root causes\nare many", "roots are many")
    asked = {"model": "glm-4-9b-chat", "messages": [USER], "tools": [TOOL], "stream": True}
    parts = [p.choices[0] for p in client.chat.completions.create(**asked)]
    assert "".join(p.delta.content or "" for p in parts) == ""
    [call] = [c for p in parts for c in p.delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "roots")
    assert call.function.arguments == '{"coefficients": [1, 0, -2]}'
    assert parts[-1].finish_reason == "tool_calls"
    assert len(parts) == 2  # the role, then the call: nothing is said while it is written
    for wanted in ("root causes\nare many", "roots are many"):
        parts = [p.choices[0] for p in client.chat.completions.create(**asked)]
        assert "".join(p.delta.content or "" for p in parts) == wanted
        assert parts[-1].finish_reason == "stop"


def test_tools_that_are_not_asked_for(say: Any) -> None:
    client, prompts = say(CALL, CALL, "a")
    asked = {"model": "glm-4-9b-chat", "messages": [USER], "tools": [TOOL]}
    plain = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (plain.message.content, plain.finish_reason) == (CALL, "stop")
    assert "roots" not in prompts[0]
    for choice, fact in (
        ("maybe", "tool_choice.type: must be 'none', 'auto', 'required' or 'function'"),
        ({"type": "function", "function": {"name": "root"}}, "unknown function 'root'; known: roo"),
        ({"type": "function"}, "tool_choice.function: missing; give its name"),
        ({"type": "allowed_tools"}, "must be 'none', 'auto', 'required' or 'function'"),
    ):
        with pytest.raises(openai.BadRequestError, match=fact):
            client.chat.completions.create(**asked, tool_choice=choice)
    with pytest.raises(openai.BadRequestError, match="required needs tools; give some"):
        client.chat.completions.create(**{**asked, "tools": []}, tool_choice="required")
    called = client.chat.completions.create(**asked).choices[0]
    assert called.message.content is None
    assert called.message.tool_calls[0].function.name == "roots"


def test_a_template_without_tools_refuses_them(say: Any, server: Any) -> None:
    client, _ = say(template=TEMPLATE.replace("tool", "word").replace("m.metadata", "''"))
    with pytest.raises(openai.BadRequestError, match="chat template knows no tools"):
        client.chat.completions.create(model="glm-4-9b-chat", messages=[USER], tools=[TOOL])
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as blanks,
        pytest.raises(openai.BadRequestError, match="no chat template with tools"),
    ):
        blanks.chat.completions.create(model="small", messages=[USER], tools=[TOOL])


def test_a_thought_is_a_field_of_its_own(say: Any) -> None:
    """Whole and streamed; sent back, it is taken and not shown to the model again."""
    text = "\nTwo, or\nso.\n</think>\n\nSqrt of 2."
    client, prompts = say(text, text, "</think>a", template=THINKING)
    asked: dict[str, Any] = {"model": "glm-4-9b-chat", "messages": [USER]}
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.reasoning_content, message.content) == ("Two, or\nso.", "Sqrt of 2.")
    parts = [p.choices[0].delta for p in client.chat.completions.create(**asked, stream=True)]
    thought = "".join(getattr(p, "reasoning_content", None) or "" for p in parts)
    assert (thought, "".join(p.content or "" for p in parts)) == ("Two, or\nso.", "Sqrt of 2.")
    again = client.chat.completions.create(**{**asked, "messages": [USER, message, USER]})
    assert again.choices[0].message.content == "a"
    assert "Two" not in prompts[-1]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("thought", "text", "wanted"),
    [
        ("none", "<think>a</think>b", ("", "<think>a</think>b")),
        ("possible", " <think>\na </thin\n\n</think>\n\nb\n", ("a </thin", "b\n")),
        ("possible", "<thinking", ("", "<thinking")),
        ("possible", "", ("", "")),
        ("opened", "\na<think>\n</think>", ("a<think>", "")),
        ("opened", "never closed </", ("never closed </", "")),
    ],
)
def test_any_pieces_give_the_same_parts(
    thought: Any, text: str, wanted: tuple[str, str], size: int
) -> None:
    splitter = Splitter(thought)
    pieces = [splitter.feed(text[i : i + size]) for i in range(0, len(text), size)]
    pieces.append(splitter.feed("", last=True))
    assert tuple("".join(p[i] or "" for p in pieces) for i in (0, 1)) == wanted


def test_what_is_no_call() -> None:
    for text in ("roots", "roots\n[1]", "roots\n{", "other\n{}", "a\nroots\n{}", "\n{}"):
        assert parse_call(text, Tools(["roots"])) is None
    assert parse_call(" roots \n {}\n", Tools(["roots"]))[1:] == ("roots", "{}")  # type: ignore[index]  # it is a call
