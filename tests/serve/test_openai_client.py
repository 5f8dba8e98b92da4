"""What an OpenAI client sends by itself is taken: its own replies, nulls and values that ask for
nothing. Every other parameter of the client is refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai's client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

ASK: dict[str, Any] = {"model": "small", "max_tokens": 4, "seed": 1}
USER = {"role": "user", "content": "the fox"}
KINDS = {
    "/chat/completions": {**ASK, "messages": [USER]},
    "/completions": {**ASK, "prompt": "the fox"},
}
HONOURED = {
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "seed", "stop"),
    *("stream", "stream_options", "temperature", "top_p"),
}
IGNORED = {
    "metadata": {"run": "1"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": 1},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "user": "u",
}
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0.0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "verbosity": "medium",
}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def parameters(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters) - TRANSPORT


def test_its_own_replies_are_appended(client: Any) -> None:
    """A client appends the reply as it came, whole or joined from a stream, and asks again."""
    messages: list[Any] = [USER]
    for _ in range(2):
        reply = client.chat.completions.create(messages=messages, **ASK)
        messages += [reply.choices[0].message, USER]
    dumped = reply.choices[0].message.model_dump()  # every field of the client's class, most null
    assert {"refusal", "tool_calls", "function_call", "audio"} <= dumped.keys()
    other_servers = {"tool_calls": [], "annotations": [], "reasoning_content": ""}
    messages += [{**dumped, **other_servers}, {**USER, "content": [{"type": "text", "text": "a"}]}]
    with client.chat.completions.stream(messages=messages, **ASK) as stream:
        assert any(event.type == "chunk" for event in stream)
        streamed = stream.current_completion_snapshot
    messages += [streamed.choices[0].message, USER]
    assert client.chat.completions.create(messages=messages, **ASK).choices


def test_models_are_retrieved_by_name(client: Any, server: Any) -> None:
    [model] = client.models.list()
    assert client.models.retrieve("small") == model
    for name in ("smalll", "owner/name"):
        with pytest.raises(openai.NotFoundError, match=f"unknown model '{name}'; known: small"):
            client.models.retrieve(name)
    text = httpx.get(f"{server.url}/metrics").text
    assert "smalll" not in text  # paths of a client's would fill the memory
    assert 'path="/v1/models/{name:path}",status="404"' in text


@pytest.mark.parametrize("path", KINDS)
def test_neutral_values_change_nothing(client: Any, path: str) -> None:
    plain = client.post(path, body=KINDS[path], cast_to=httpx.Response).json()
    neutral = {**NEUTRAL, **IGNORED, "top_k": 0, "min_p": 0, "stop": ""}
    nulls = dict.fromkeys([*NEUTRAL, *IGNORED, "audio", "temperature", "stop", "stream"])
    for more in (neutral, nulls):
        body = {**more, **KINDS[path]}
        assert (
            client.post(path, body=body, cast_to=httpx.Response).json()["choices"]
            == (plain["choices"])
        )


@pytest.mark.parametrize("path", KINDS)
def test_all_else_is_refused_by_name(client: Any, path: str) -> None:
    """Every parameter of the client's method is honoured, changes no reply, or is refused."""
    method = client.chat.completions.create if "chat" in path else client.completions.create
    for name in parameters(method) - HONOURED - IGNORED.keys():
        with pytest.raises(openai.BadRequestError) as refused:
            client.post(path, body={**KINDS[path], name: ["x"]}, cast_to=httpx.Response)
        assert refused.value.body["message"] == f"{name}: not supported here; leave it out"


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        (
            {"role": "tool", "content": "3", "tool_call_id": "a"},
            'tool_call_id="a", messages.1.role',
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]},
            "messages.1.tool_calls",
        ),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages.1.content.0.type=image_url",
        ),
        ({"role": "assistant", "refusal": "no"}, 'messages.1.refusal="no": not supported here'),
    ],
)
def test_messages_that_are_not_text(client: Any, message: Any, fact: str) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported here; leave") as refused:
        client.chat.completions.create(messages=[USER, message, USER], **ASK)
    assert fact in refused.value.body["message"]


def test_prompts_in_a_list_and_negative_seeds(client: Any) -> None:
    one = client.completions.create(**{**KINDS["/completions"], "prompt": ["the fox"]})
    assert one.choices[0].text == client.completions.create(**KINDS["/completions"]).choices[0].text
    for prompt in (["a", "b"], [1, 2], []):
        with pytest.raises(openai.BadRequestError, match="prompt: one text is supported here"):
            client.completions.create(**{**KINDS["/completions"], "prompt": prompt})
    assert client.completions.create(**{**KINDS["/completions"], "seed": -1}).choices
