"""JSON mode and JSON schemas: a model of random weights writes JSON of the schema all the same."""

from __future__ import annotations

import base64
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core.pretrained.tokenizers import GLM4Tokenizer
from glm_core.serve.grammar import Grammars

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


@pytest.fixture(scope="module")
def client(serving: Any, causal_model: Any) -> Iterator[Any]:
    with (
        serving(model=causal_model, max_tokens=400) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


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


def test_without_the_grammar_library(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="llguidance is not installed on the server"):
        reply(client, response_format=FORMAT)
    assert reply(client, response_format={"type": "text"}, max_tokens=3).message.content


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
    constraint = Grammars(chat_model).json({"type": "boolean"})
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
