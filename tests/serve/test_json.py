"""JSON mode and JSON schemas: a model of random weights writes JSON of the schema all the same."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core.errors import ConfigError
from glm_core.pretrained.templates import GLM4, ChatTemplate
from glm_core.pretrained.tokenizers import GLM4Tokenizer
from glm_core.serve.grammar import Grammars, Wanted

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai's client is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["fox", "dog"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["word", "count", "list"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
ASK: dict[str, Any] = {
    "model": "glm-4",
    "messages": [{"role": "user", "content": "the fox"}],
    "max_tokens": 400,
}


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "a.b"}},
]


@pytest.fixture(scope="module")
def client(serving: Any, causal_model: Any) -> Iterator[Any]:
    with (
        serving(model=causal_model, max_tokens=400) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def wanted(**more: Any) -> Wanted:
    from glm_core.serve.schema import ChatRequest

    return ChatRequest(**ASK, **more).wanted


def reply(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{**ASK, **more}).choices[0]


def test_json_of_the_schema(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    texts = set()
    for seed in range(4):
        choice = reply(client, seed=seed, response_format=FORMAT)
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value.keys() == {"word", "count", "list"}
        assert value["word"] in ("fox", "dog")
        assert 0 <= value["count"] <= 99
        assert all(type(item) is bool for item in value["list"])
        texts.add(choice.message.content)
    assert len(texts) > 1
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(reply(client, seed=0).message.content)


def test_several_and_streamed(client: Any) -> None:
    """Each of `n` replies has a grammar of its own; others in the batch are not touched."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    whole = client.chat.completions.create(**ASK, seed=5, n=3, response_format=FORMAT)
    streamed = ["", "", ""]
    for part in client.chat.completions.create(
        **ASK, seed=5, n=3, response_format=FORMAT, stream=True
    ):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [c.message.content for c in whole.choices]
    assert all(json.loads(text)["word"] for text in streamed)
    bounded = {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}
    assert reply(client, response_format=bounded).message.content.strip() in ("true", "false")
    begun = reply(client, response_format={"type": "json_object"}, seed=1).message.content
    assert begun.lstrip()[0] == "{"


def test_a_schema_that_is_none(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "number?"}}}
    with pytest.raises(openai.BadRequestError, match=r"response_format: .*correct the schema"):
        reply(client, response_format=wrong)
    with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema: missing"):
        reply(client, response_format={"type": "json_schema"})


def test_without_the_grammar_library(
    client: Any, causal_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="llguidance is not installed on the server"):
        reply(client, response_format=FORMAT)
    asked = Wanted(None, {"find": SCHEMA}, False)
    for wanted, field in (
        (asked, "tools.function.strict"),
        (asked._replace(must_call=True), "tool_choice"),
    ):
        with pytest.raises(ConfigError, match=f"{field}: llguidance is not"):
            Grammars(causal_model).constraint(wanted)
    assert reply(client, response_format={"type": "text"}, max_tokens=3).message.content


def test_calls_that_must_come(serving: Any, causal_model: Any) -> None:
    """A model of random weights calls a tool when it must, with arguments of its schema. A call
    that max_tokens cuts has a part of them."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    template = "{% for t in tools %}{{ t.function | tojson }}{% endfor %}" + GLM4
    model = dataclasses.replace(causal_model, template=ChatTemplate(source=template))
    asked = {**ASK, "tools": TOOLS, "seed": 2}
    with (
        serving(model=model, max_tokens=400) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        ended = {"required": "tool_calls", "find": "stop"}
        for name, finish in ended.items():
            named = {"type": "function", "function": {"name": name}}
            choice = named if name != "required" else name
            whole = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
            [call] = whole.message.tool_calls
            assert (whole.finish_reason, whole.message.content) == (finish, None)
            assert call.function.name in ("find", "a.b")
            assert name in ("required", call.function.name)
            if call.function.name == "find":
                assert json.loads(call.function.arguments)["word"] in ("fox", "dog")
            streamed = client.chat.completions.create(**asked, tool_choice=choice, stream=True)
            calls = [c for p in streamed for c in p.choices[0].delta.tool_calls or []]
            assert [c.function.model_dump() for c in calls] == [call.function.model_dump()]
        cut = client.chat.completions.create(**{**asked, "max_tokens": 9}, tool_choice=named)
        assert cut.choices[0].finish_reason == "length"
        assert cut.choices[0].message.tool_calls[0].function.name == "find"
        wrong = {"name": "x", "parameters": {"properties": {"a": {"type": "int?"}}}}
        bad = {**ASK, "tools": [{"type": "function", "function": wrong}]}
        with pytest.raises(openai.BadRequestError, match=r"tools\.x\.parameters: .*correct the"):
            client.chat.completions.create(**bad, tool_choice="required")
        wrong["parameters"] = {"type": "array"}
        with pytest.raises(openai.BadRequestError, match="must be 'object'; received 'array'"):
            client.chat.completions.create(**bad, tool_choice="required")


@pytest.mark.parametrize(
    ("thought", "text", "begins"),
    [
        ("none", 'find\n{"word": "fox", "count": 1, "list": []}', ""),
        ("none", 'find\n{"word": "cat', 'find\n{"word": "'),
        ("none", "find\n[", "find\n"),
        ("none", " find \n[", " find \n"),
        ("none", "\u3000find\n[", "\u3000find\n"),
        ("none", "find it", ""),
        ("none", "finds\n[", ""),
        ("none", "a.b\n[", ""),
        ("none", "hello\nfind\n[", ""),
        ("possible", "find\n[", "find\n"),
        ("possible", "<think>\nfind\n[</think>\n\nfind\n[", "<think>\nfind\n[</think>\n\nfind\n"),
        ("possible", "<think>a</think>find it", ""),
        ("opened", "find\n[</think>find\n[", "find\n[</think>find\n"),
    ],
)
def test_strict_functions(causal_model: Any, thought: str, text: str, begins: str) -> None:
    """With `auto` a reply is any text, or a call of the schema where the function is strict, with a
    thought before it or not. begins: what of the text is allowed; empty: all."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    tokenizer, stop = causal_model.tokenizer, causal_model.stop
    model: Any = types.SimpleNamespace(tokenizer=tokenizer, stop=stop, thought=thought)
    constraint = Grammars(model).constraint(wanted(tools=TOOLS))
    said = ""
    for character in text:
        for token in causal_model.tokenizer.encode(character):
            logits = torch.zeros(causal_model.tokenizer.vocab)
            constraint.restrict(logits)
            if not logits[token].isfinite():
                assert said == begins
                return
            constraint.accept(token)
        said += character
    assert begins == ""


def test_json_beside_tools(causal_model: Any) -> None:
    """With a response_format a reply is JSON or a call, of any arguments where not strict."""
    asked: dict[str, Any] = {"tools": TOOLS, "response_format": FORMAT}
    calls: dict[str, Any] = {"find": SCHEMA, "a.b": {"type": "object"}}
    assert wanted(**asked) == Wanted(SCHEMA, calls, False)
    assert wanted(**asked, tool_choice="none") == Wanted(SCHEMA, {}, False)
    assert wanted(**asked, tool_choice="required") == Wanted(SCHEMA, calls, True)
    assert wanted(tools=TOOLS[1:]).is_free


def test_the_tiktoken_file_of_glm_4(tmp_path: Path) -> None:
    """After `true` only the tokens that end a reply are left."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    tokens = [*(bytes([b]) for b in range(256)), b"tr", b"ue"]
    lines = (base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = GLM4Tokenizer(tmp_path / "tokenizer.model", {})
    stop = (tokenizer.special["<|endoftext|>"], tokenizer.special["<|user|>"])
    chat_model: Any = types.SimpleNamespace(tokenizer=tokenizer, stop=stop, thought="none")
    constraint = Grammars(chat_model).constraint(Wanted({"type": "boolean"}, {}, False))
    shown = []
    for token in (256, 257):
        logits = torch.zeros(tokenizer.vocab)
        constraint.restrict(logits)
        shown.append(set(logits.isfinite().nonzero()[:, 0].tolist()))
        constraint.accept(token)
    logits = torch.zeros(tokenizer.vocab)
    constraint.restrict(logits)
    assert shown == [{ord("t"), ord("f"), 256}, {257}]
    assert tuple(logits.isfinite().nonzero()[:, 0].tolist()) == stop
