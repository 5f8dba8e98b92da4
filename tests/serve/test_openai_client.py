"""What an OpenAI client sends by itself is taken: its own replies, nulls and values that ask for
nothing. Every other parameter of the client is refused by its name."""

from __future__ import annotations

import dataclasses
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
    *("stream", "stream_options", "temperature", "top_p", "n", "logprobs", "top_logprobs"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "tools", "tool_choice"),
    "response_format",
}
OF_CHAT = {"response_format", "top_logprobs", "tools", "tool_choice"}
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
VLLM = {"repetition_penalty", "min_p", "stop_token_ids", "top_k"}
"""fields that the client's method does not have"""
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
    honoured = HONOURED if "chat" in path else HONOURED - OF_CHAT
    for name in parameters(method) - honoured - IGNORED.keys():
        with pytest.raises(openai.BadRequestError) as refused:
            client.post(path, body={**KINDS[path], name: ["x"]}, cast_to=httpx.Response)
        assert refused.value.body["message"] == f"{name}: not supported here; leave it out"


def test_several_replies(client: Any) -> None:
    """Each of `n` replies is drawn with a seed of its own, whole and streamed; usage counts all."""
    asked = {**ASK, "messages": [USER], "n": 3, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    texts = [c.message.content for c in whole.choices]
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    singles = [
        client.chat.completions.create(**{**asked, "n": 1, "seed": ASK["seed"] + i})
        for i in range(3)
    ]
    assert texts == [s.choices[0].message.content for s in singles]
    assert whole.usage.completion_tokens == sum(s.usage.completion_tokens for s in singles)
    assert whole.usage.prompt_tokens == singles[0].usage.prompt_tokens
    streamed = dict.fromkeys(range(3), "")
    options = {"stream_options": {"include_usage": True}}
    for part in client.chat.completions.create(**asked, stream=True, **options):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts
    assert part.usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="n=64: 4 replies run here and 16 wait; ask"):
        client.chat.completions.create(**{**asked, "n": 64})
    assert client.chat.completions.create(**asked).choices == whole.choices


def test_log_probabilities(client: Any) -> None:
    """Tokens, their log probabilities and the most likely ones, at both endpoints and streamed."""
    asked = {**ASK, "messages": [USER], "max_tokens": 6, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**asked).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 6
    assert "".join(t.token for t in tokens).strip() == choice.message.content.strip()
    for t in tokens:
        assert t.logprob == t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob
        assert t.bytes is None or bytes(t.bytes).decode() == t.token
    parts = client.chat.completions.create(**asked, stream=True)
    streamed = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert streamed == tokens
    plain = {k: v for k, v in asked.items() if "logprobs" not in k}
    assert client.chat.completions.create(**plain).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="top_logprobs: needs logprobs"):
        client.chat.completions.create(**plain, top_logprobs=2)
    text = {**ASK, "prompt": "the fox", "temperature": 0, "logprobs": 1}
    done = client.completions.create(**text).choices[0]
    assert "".join(done.logprobs.tokens).strip() == done.text.strip()
    assert len(done.logprobs.token_logprobs) == len(done.logprobs.text_offset) == 4
    likely = [next(iter(t.values())) for t in done.logprobs.top_logprobs]
    assert likely == done.logprobs.token_logprobs


def test_penalties_and_biases_change_the_reply(client: Any, server: Any) -> None:
    asked: dict[str, Any] = {**ASK, "messages": [USER], "temperature": 0, "max_tokens": 20}

    def reply(**more: Any) -> Any:
        extra = {k: more.pop(k) for k in list(more) if k in VLLM}
        return client.chat.completions.create(**{**asked, **more}, extra_body=extra).choices[0]

    plain = reply().message.content
    for more in (
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"repetition_penalty": 2},
    ):
        assert reply(**more).message.content != plain
    encode = server.engine.chat_model.tokenizer.encode
    fox = encode("fox")[-1]
    assert reply(logit_bias={str(fox): 100}).message.content.count("fox") == 20
    stopped = reply(logit_bias={str(fox): 100}, stop_token_ids=[fox])
    assert (stopped.message.content, stopped.finish_reason) == ("", "stop")
    assert reply(min_p=1, temperature=1.5).message.content == plain
    for field in ({"logit_bias": {"999": 1}}, {"stop_token_ids": [999]}):
        with pytest.raises(openai.BadRequestError, match="999 is no token; allowed are 0"):
            reply(**field)


def test_the_models_own_sampling_is_the_default(serving: Any, chat_model: Any) -> None:
    """What generation_config.json recommends holds where the request says nothing."""
    greedy = dataclasses.replace(chat_model, sampling={"temperature": 0.0, "top_k": 5})
    with (
        serving(model=greedy) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        texts = {
            seed: client.chat.completions.create(
                model="small", messages=[USER], max_tokens=9, seed=seed, **more
            )
            .choices[0]
            .message.content
            for seed, more in ((1, {}), (2, {}), (3, {"temperature": 2}))
        }
        assert texts[1] == texts[2] != texts[3]


def test_pages_of_other_origins(serving: Any) -> None:
    """A browser's question whether a page may call is answered without the API key."""
    ask = {"Access-Control-Request-Method": "POST", "Origin": "https://example.org"}
    with serving(token="secret", origins=("https://example.org",)) as served:
        url = f"{served.url}/v1/models"
        allowed = httpx.options(url, headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        assert httpx.options(url, headers={**ask, "Origin": "https://other"}).status_code == 400
        assert httpx.get(url, headers=ask).status_code == 401


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        ({"role": "function", "content": "3", "name": "a"}, "messages.1.role=function"),
        ({"role": "assistant", "content": "", "function_call": {"name": "a"}}, "function_call"),
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
