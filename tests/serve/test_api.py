"""The server answers openai's client and plain HTTP requests."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
import torch

from glm_core.model.sample import Sampling

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai's client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

ASK: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "the fox"}]}

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def until(condition: Any) -> None:
    """Waits until another thread has made the condition true."""

    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(wait(), 30))


def test_chat_streamed_and_whole_are_the_same(client: Any) -> None:
    body = {**ASK, "max_tokens": 30, "temperature": 0.9, "seed": 5}
    whole = client.chat.completions.create(**body)
    choice = whole.choices[0]
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 30
    assert whole.usage.prompt_tokens > 3
    parts = list(
        client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(p.choices[0].delta.content for p in parts if p.choices)
    assert text == choice.message.content != ""
    assert parts[-1].usage == whole.usage
    assert parts[-2].choices[0].finish_reason == choice.finish_reason
    assert len(parts) > 5


def test_completions_stop_strings_and_seeds(client: Any) -> None:
    def complete(**more: Any) -> Any:
        return client.completions.create(
            **{"model": "small", "prompt": "the [MASK] dog", "max_tokens": 40, "seed": 1, **more}
        ).choices[0]

    whole = complete().text
    assert complete().text == whole
    assert len({complete(seed=s).text for s in range(4)}) > 1
    stop = whole[4:7]
    cut = complete(stop=[stop, "never to be seen"])
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    parts = client.completions.create(
        model="small", prompt="the [MASK] dog", max_tokens=40, seed=1, stop=stop, stream=True
    )
    assert "".join(p.choices[0].text for p in parts) == cut.text


def test_replies_do_not_depend_on_other_requests(client: Any, server: Any) -> None:
    body = [{**ASK, "max_tokens": 25, "seed": s} for s in range(12)]
    alone = [client.chat.completions.create(**a).choices[0].message.content for a in body]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as crowd:
            done = await asyncio.gather(*(crowd.chat.completions.create(**a) for a in body))
        return [d.choices[0].message.content for d in done]

    assert asyncio.run(together()) == alone
    assert len(set(alone)) > 6


def test_models_health_metrics(client: Any, server: Any) -> None:
    assert [m.id for m in client.models.list()] == ["small"]
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ok"
    assert health["slots"] == 4
    client.chat.completions.create(**ASK, max_tokens=7)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'glm_core_requests_total{path="/v1/chat/completions",status="200"}' in text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(figures["glm_core_tokens_total"]) > 0
    assert float(figures["glm_core_first_token_seconds_count"]) > 0
    assert float(figures["glm_core_waiting"]) == 0


def test_the_legacy_interface(server: Any) -> None:
    """The history comes back with one more pair, as from ChatGLM-6B's api.py."""
    first = httpx.post(server.url, json={"prompt": "你好", "history": []}).json()
    assert first["status"] == 200
    assert first["history"] == [["你好", first["response"]]]
    second = httpx.post(server.url, json={"prompt": "fox", "history": first["history"]}).json()
    assert [pair[0] for pair in second["history"]] == ["你好", "fox"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "smalll"}, 404, "did you mean small?"),
        ({"max_tokens": 201}, 400, "max_tokens=201: this server gives 200 at most"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "fox " * 600}]}, 400, "no room for a reply"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
        ({"n": 0}, 400, "n: must be greater than or equal to 1; received 0"),
        ({"store": True}, 400, "store=true: not supported here; leave it out"),
        ({"store": 0, "service_tier": "x"}, 400, 'store=0, service_tier="x": not supported here'),
        ({"logit_bias": {"fox": 2}}, 400, "logit_bias.fox"),
        ({"logit_bias": {"1": 200}}, 400, "logit_bias.1: must be less than or equal to 100"),
        ({"temperature": "hot"}, 400, "temperature: must be a valid number"),
        ({"messages": None}, 400, "messages: missing; give it"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: missing"),
        ({"best-of": 2}, 400, "best-of: unknown field; leave it out"),
        ({"messages": [{"content": [{"type": "\ud800"}]}]}, 400, "content.0.type=\\ud800: not"),
    ],
    ids=str,
)
def test_bad_requests(server: Any, change: dict[str, Any], status: int, message: str) -> None:
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps({**ASK, **change}), headers=JSON
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b"null", b'{"model": 1', b""])
def test_malformed_json(server: Any, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/"):
        response = httpx.post(server.url + path, content=body, headers=JSON)
        assert response.status_code == 400
        assert response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_bodies_are_bounded(server: Any) -> None:
    url = f"{server.url}/v1/completions"
    long = json.dumps({"model": "small", "prompt": "x" * 5000}).encode()
    assert httpx.post(url, content=long, headers=JSON).status_code == 413
    chunked = httpx.post(
        url, content=(long[i : i + 500] for i in range(0, len(long), 500)), headers=JSON
    )
    assert chunked.status_code == 400
    assert httpx.get(f"{server.url}/nowhere").status_code == 404
    assert 'path="other",status="404"' in httpx.get(f"{server.url}/metrics").text


def test_the_key_is_required(serving: Any) -> None:
    with serving(token="secret") as served:
        url = f"{served.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer secre"}).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.post(served.url, json={"prompt": "a"}).status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_requests_beyond_the_queue_are_refused(serving: Any) -> None:
    """With one slot, which is taken, and a queue of 2, two of ten requests wait and eight get
    429."""
    with serving(slots=1, queue=2, max_tokens=480) as served:
        engine, step, go_on = served.engine, served.engine._decoder.step, threading.Event()
        engine._decoder.step = lambda: step() if go_on.wait() else []
        long = Sampling(max_tokens=400, seed=1)
        engine.submit(engine.chat_model.completion_prompt("the fox"), long, lambda event: None)
        until(lambda: engine.load == (1, 0))

        async def ask(client: Any, refused: list[int]) -> int:
            body = {"model": "small", "prompt": "the fox", "max_tokens": 3}
            code = (await client.post(f"{served.url}/v1/completions", json=body)).status_code
            refused += [code] if code == 429 else []
            if len(refused) == 8:
                go_on.set()
            return int(code)

        async def crowd() -> list[int]:
            refused: list[int] = []
            async with httpx.AsyncClient(timeout=60) as client:
                return await asyncio.gather(*(ask(client, refused) for _ in range(10)))

        assert sorted(asyncio.run(crowd())) == [200] * 2 + [429] * 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(serving: Any, stream: bool) -> None:
    with serving(slots=1, max_tokens=480) as served:
        decoder = served.engine._decoder
        step, steps = decoder.step, []
        gone = []

        def slow() -> Any:  # so the reply is not complete before the client has left
            if len(steps) > 3 and not gone:
                return []
            steps.append(1)
            return step()

        decoder.step = slow

        async def three_steps() -> None:
            while len(steps) < 3:
                await asyncio.sleep(0.005)

        async def leave() -> None:
            async with httpx.AsyncClient() as client:
                body = {**ASK, "max_tokens": 480, "stream": stream, "seed": 1}
                url = f"{served.url}/v1/chat/completions"
                task = asyncio.create_task(client.post(url, json=body))
                await asyncio.wait_for(three_steps(), timeout=60)
                task.cancel()

        asyncio.run(leave())
        until(lambda: decoder.free == 1)
        gone.append(1)
        assert len(steps) < 10
        assert served.engine.load == (0, 0)
        response = httpx.post(f"{served.url}/v1/chat/completions", json={**ASK, "max_tokens": 5})
        assert response.status_code == 200


def test_nan_logits_are_an_error_and_the_server_stays(serving: Any, chat_model: Any) -> None:
    import copy

    broken = copy.deepcopy(chat_model)
    with torch.no_grad():
        broken.model.blocks[0].mlp.down.bias[0] = torch.nan
    with serving(model=broken) as served:
        url = f"{served.url}/v1/chat/completions"
        response = httpx.post(url, json=ASK)
        assert response.status_code == 500
        assert "op linear in blocks.0.mlp.down" in response.json()["error"]["message"]
        lines = httpx.post(url, json={**ASK, "stream": True}).text
        assert "not finite" in lines
        assert httpx.get(f"{served.url}/health").json()["running"] == 0


def test_a_bug_leaves_no_request_waiting(serving: Any, capsys: Any) -> None:
    with serving() as served:
        step = served.engine._decoder.step

        def fail() -> Any:
            served.engine._decoder.step = step
            raise ZeroDivisionError("planted")

        served.engine._decoder.step = fail
        url = f"{served.url}/v1/chat/completions"
        response = httpx.post(url, json={**ASK, "max_tokens": 9, "seed": 1})
        assert response.status_code == 500
        assert "ZeroDivisionError: planted" in response.json()["error"]["message"]
        assert httpx.post(url, json={**ASK, "max_tokens": 9}).status_code == 200
    assert "planted" in capsys.readouterr().err
