"""Holds speculative decoding to plain decoding, token for token, whatever the drafts are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import small_experts
import torch

from glm_core.backends import registry
from glm_core.config import ModelConfig
from glm_core.errors import ConfigError
from glm_core.model.generate import Decoder, generate
from glm_core.model.generation import Generation
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.runner import Runner
from glm_core.model.sample import Sampling

pytestmark = pytest.mark.skipif(not registry.probe("cpu").ok, reason="backend cpu is not built")
GROUPED, LATENT = (dataclasses.replace(m, max_length=48) for m in small_experts.BOTH)
PROMPTS = [causal(range(2, 11)), Prompt((5, 9, 3, 7, 1), sep=4, mask=2), causal([4])]
SETTINGS = {
    "greedy": Sampling(max_tokens=20, temperature=0.0),
    "sampled": Sampling(max_tokens=20, temperature=0.8, top_p=0.9, seed=3, min_p=0.01),
    "penalised": Sampling(max_tokens=20, temperature=1.2, seed=1, repetition_penalty=1.3),
}


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    with registry.use("cpu"):
        yield


def built(config: ModelConfig) -> GLM:
    """Returns a model whose further layer often agrees with it: all blocks add little to the
    embedding, so the token itself decides most."""
    model = GLM(dataclasses.replace(config, init_std=0.3)).init_weights(1).requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "experts_down.weight")):
            p.mul_(0.2)
    width = config.hidden
    model.blocks[-1].join.weight.copy_(torch.cat((torch.eye(width), torch.zeros(width, width)), 1))
    return model


def one_by_one(runner: Runner, prompts: list[Prompt], sampling: Sampling) -> list[Generation]:
    return [generate(runner, [p], sampling)[0] for p in prompts]


@pytest.mark.parametrize("config", [GROUPED, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_those_of_plain_decoding(config: ModelConfig, settings: str) -> None:
    """And some drafts are right, some wrong."""
    model, sampling = built(config), SETTINGS[settings]
    runner = Runner(model, 1, chunk=4, speculate=3)
    plain = one_by_one(Runner(model, 1, chunk=4), PROMPTS, sampling)
    drafted = one_by_one(runner, PROMPTS, sampling)
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]
    assert [g.finish for g in drafted] == [g.finish for g in plain]
    assert 0 < runner.accepted < runner.drafted


@pytest.mark.parametrize("config", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_checking_drafts_gives_the_bits_of_single_steps(config: ModelConfig) -> None:
    """Rejected drafts leave nothing behind: the next round overwrites them."""
    model = built(config).bfloat16()
    for _ in convert(model, Quantization(bits=4, group=32, activation_bits=8)):
        pass
    first, second = Runner(model, 1), Runner(model, 2)
    tokens, prompt = [7, 50, 9, 33, 21, 60], causal([3, 1, 4])
    for runner, slot in ((first, 0), (second, 1)):
        runner.prefill(slot, [prompt])
    g = Generation(prompt, Sampling(), 0, 0)
    g.tokens = tokens
    rows = g.latest(6)
    single = torch.cat([first.decode([row]) for row in rows])
    second.verify(1, [rows[0], *(r._replace(token=2) for r in rows[1:])])
    assert torch.equal(second.verify(1, rows[:2]), single[:2])
    assert torch.equal(second.verify(1, rows[2:]), single[2:])


def test_drafts_end_where_the_reply_does() -> None:
    """At a stop token that was drafted, at max_tokens, and at the end of the context."""
    model = built(GROUPED)
    runner = Runner(model, 1, length=14, speculate=4)
    greedy = Sampling(max_tokens=99, temperature=0.0)
    [whole] = generate(runner, PROMPTS[:1], greedy)
    assert (len(whole.tokens), whole.finish) == (5, "length")
    for count in range(1, 5):
        [short] = generate(runner, PROMPTS[:1], dataclasses.replace(greedy, max_tokens=count))
        assert short.tokens == whole.tokens[:count]
    stop = dataclasses.replace(greedy, stop=(whole.tokens[3],))
    [stopped] = generate(runner, PROMPTS[:1], stop)
    assert stopped.finish == "stop"
    assert stop.stop[0] not in stopped.tokens


def test_sequences_that_come_and_go_draft_when_they_are_alone() -> None:
    """With others beside them they decode step by step; a reused beginning has no hidden states."""
    model = built(LATENT)
    runner = Runner(model, 2, chunk=4, speculate=2)
    decoder = Decoder(runner, reuse=True)
    long, short = (Sampling(max_tokens=n, seed=5, temperature=0.7) for n in (30, 4))
    first = decoder.add(PROMPTS[0], long)
    decoder.step()
    assert runner.drafted
    second = decoder.add(causal([*range(2, 11), 20]), short)
    assert second.reused == 8
    while not second.finish:
        before = runner.drafted
        decoder.step()
        assert runner.drafted == before
    while not first.finish:
        decoder.step()
    assert runner.drafted > before
    plain = Runner(model, 1, chunk=4)
    assert first.tokens == generate(plain, PROMPTS[:1], long)[0].tokens
    assert second.tokens == generate(plain, [second.prompt], short)[0].tokens


def test_a_model_without_the_layer_cannot_draft() -> None:
    model = GLM(dataclasses.replace(GROUPED, num_mtp_layers=0))
    with pytest.raises(ConfigError, match=r"speculate=2: the model has no layer of multi-token"):
        Runner(model, 1, speculate=2)
    with pytest.raises(ConfigError, match=r"speculate=8: must lie in 0 \.\.\. 7"):
        Runner(model, 1, speculate=8)
