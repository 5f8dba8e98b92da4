"""Adapters chosen by request, and prompts that begin alike, with the openai client: what a request
gets does not depend on who else asks."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core.backends import registry
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.model.adapters import AdapterConfig, adapter_state, attach
from glm_core.model.generate import Decoder
from glm_core.model.loras import LoRAs
from glm_core.model.prompt import Prompt
from glm_core.model.runner import Runner
from glm_core.model.sample import Sampling
from glm_core.pretrained import peft
from glm_core.pretrained.weights.layouts import LAYOUTS

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai's client is not installed")

LONG = "The quick brown fox jumps over the lazy dog. " * 3
CHUNK = 16
KINDS = {
    "fox": AdapterConfig(rank=3, targets="attention.qkv mlp.down"),
    "dog": AdapterConfig(rank=2, alpha=6.0, targets="attention.qkv attention.out"),
}


def adapted(model: Any, name: str) -> Any:
    """Returns the model with an adapter of random values attached, as --adapter does."""
    built = attach(copy.deepcopy(model.model), KINDS[name])
    draw = torch.Generator().manual_seed(len(KINDS[name].targets))
    with torch.no_grad():
        for p in adapter_state(built).values():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return dataclasses.replace(model, model=built.requires_grad_(False))


def ask(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": more.pop("content", "the fox")}
    return {"model": "glm-4", "messages": [message], "max_tokens": 12, "seed": 3, **more}


@pytest.fixture(scope="module")
def client(serving: Any, causal_model: Any) -> Iterator[Any]:
    loras = LoRAs(causal_model.model)
    for name, config in KINDS.items():
        loras.add(name, config, adapter_state(adapted(causal_model, name).model))
    with (
        serving(model=causal_model, chunk=CHUNK, loras=loras) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client,
    ):
        yield client


def test_each_request_gets_its_adapter(client: Any, serving: Any, causal_model: Any) -> None:
    """Alone and among requests for others, a reply is that of a server with this adapter alone."""
    expected = {}
    for name in ("glm-4", *KINDS):
        model = adapted(causal_model, name) if name in KINDS else causal_model
        with (
            serving(model=model, slots=1) as served,
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as alone,
        ):
            expected[name] = alone.chat.completions.create(**ask(logprobs=True)).choices
    assert len({e[0].message.content for e in expected.values()}) == 3
    for name, choices in expected.items():
        reply = client.chat.completions.create(**ask(model=name, logprobs=True))
        assert (reply.choices, reply.model) == (choices, name)

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as crowd:
            names = [*expected] * 3
            bodies = [ask(model=name, logprobs=True) for name in names]
            replies = await asyncio.gather(*(crowd.chat.completions.create(**b) for b in bodies))
            return [(r.model, r.choices) for r in replies]

    for name, choices in asyncio.run(together()):
        assert choices == expected[name]


def test_adapters_are_models(client: Any) -> None:
    models = {m.id: m.parent for m in client.models.list()}
    assert models == {"glm-4": None, "fox": "glm-4", "dog": "glm-4"}
    assert client.models.retrieve("dog").id == "dog"
    with pytest.raises(openai.NotFoundError, match="unknown model 'dgo'; known: dog, fox, glm-4"):
        client.chat.completions.create(**ask(model="dgo"))
    assert client.completions.create(model="fox", prompt="the", max_tokens=2).model == "fox"


def test_prompts_that_begin_alike(client: Any, serving: Any, causal_model: Any) -> None:
    """usage says what was in the cache, whole and streamed; the reply stays the same, and an
    adapter's keys are its own."""
    bodies = [ask(content=LONG + end, logprobs=True, model=m) for end in "ab" for m in KINDS]
    bodies = [ask(content=LONG, logprobs=True), *bodies]
    with (
        serving(model=causal_model, chunk=CHUNK, slots=1) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as fresh,
    ):
        first = fresh.chat.completions.create(**bodies[0])
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        again = fresh.chat.completions.create(**bodies[0])
        assert again.choices == first.choices
        cached = again.usage.prompt_tokens_details.cached_tokens
        assert cached == (first.usage.prompt_tokens - 1) // CHUNK * CHUNK > CHUNK
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = fresh.chat.completions.create(**bodies[0], **options)
        assert last.usage == again.usage
        text = served.engine.metrics.text().decode()
        assert f"glm_core_reused_tokens_total {2.0 * cached}" in text
    replies = [client.chat.completions.create(**body) for body in bodies]
    numbers = [r.usage.prompt_tokens_details.cached_tokens for r in replies]
    assert numbers[:3] == [0, 0, 0]
    assert min(numbers[3:]) > CHUNK
    assert [r.choices for r in replies[:1]] == [first.choices]


def test_steps_without_an_adapter_stay_whole(causal_model: Any) -> None:
    """One call of the backend, although the model has adapters; with an adapter's row the session
    says why not."""
    loras = LoRAs(causal_model.model)
    loras.add("fox", KINDS["fox"], adapter_state(adapted(causal_model, "fox").model))
    with registry.use("cpu") as session:
        decoder = Decoder(Runner(causal_model.model, 2, loras=loras))
        for adapter, reasons in (("", []), ("fox", ["a row has a LoRA of its own"])):
            decoder.add(Prompt((1, 2, 3), adapter=adapter), Sampling(max_tokens=3))
            while any(decoder.live):
                decoder.step()
            assert [f.reason for f in session.fallbacks if f.op == "decode_step"] == reasons


def test_what_is_refused(causal_model: Any) -> None:
    loras, base = LoRAs(causal_model.model), causal_model.model.config
    state = adapter_state(adapted(causal_model, "fox").model)
    loras.add("fox", KINDS["fox"], state)
    with pytest.raises(ConfigError, match="fox: the name is taken; choose another"):
        loras.add("fox", KINDS["fox"], state)
    with pytest.raises(ConfigError, match="only a LoRA goes by request"):
        loras.add("p", AdapterConfig(kind="ptuning"), {})
    with pytest.raises(ConfigError, match="has one for all requests already; leave one out"):
        LoRAs(adapted(causal_model, "fox").model)
    assert base == causal_model.model.config
    assert not adapter_state(causal_model.model)


def test_the_options(causal_model: Any, tmp_path: Path) -> None:
    """A folder of peft's is read; a wrong option says what to give."""
    from glm_core.cli.serve import load_loras, lora_paths

    [layout] = [item for item in LAYOUTS if item.name == "chatglm2"]
    state = {k: t.detach() for k, t in adapter_state(adapted(causal_model, "fox").model).items()}
    peft.write(tmp_path / "fox", KINDS["fox"], state, layout, causal_model.model.config)
    loras = load_loras(lora_paths([f"fox={tmp_path / 'fox'}"]), causal_model)
    assert loras is not None
    assert loras.names == ["fox"]
    for options in (["fox"], ["=a"], ["a=b", "a=c"]):
        with pytest.raises(GlmCoreError, match="give NAME=PATH, each name once"):
            lora_paths(options)
    with pytest.raises(GlmCoreError, match="glm-4 is the model's name"):
        load_loras({"glm-4": "a"}, causal_model)
    assert load_loras({}, causal_model) is None
