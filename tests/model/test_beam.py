"""Beam search agrees with an exhaustive search, and follows its rules one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from glm_core.config import ModelConfig
from glm_core.errors import ConfigError, GenerationError, PromptError
from glm_core.model.beam import BeamSearch, Hypothesis, search
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, causal
from glm_core.model.sample import Sampling

V, STOP, MOST = 5, 4, 4
PROMPT = causal([1, 2, 3])


@pytest.fixture(scope="module")
def built() -> GLM:
    model = GLM(ModelConfig(num_layers=1, hidden=16, num_heads=2, ffn=24, vocab=V, max_length=12))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else 0.5))
    return model


def log_probabilities(model: GLM, ids: list[int]) -> torch.Tensor:
    n = len(ids)
    place = torch.arange(n)
    with torch.no_grad():
        logits = model.logits(
            torch.tensor([ids]),
            torch.stack((place, place))[None],
            torch.zeros(1, n, dtype=torch.int32),
            (place + 1).int()[None],
        )
    return logits[0, -1].double()


def repeats(ids: tuple[int, ...], n: int) -> bool:
    """Returns whether a generated token closes an n-gram that an earlier one closed."""
    text, closed = [*PROMPT.tokens, *ids], set()
    for i in range(len(PROMPT.tokens), len(text)):
        gram = tuple(text[i - n + 1 : i + 1])
        if gram in closed:
            return True
        closed.add(gram)
    return False


def every_hypothesis(model: GLM, settings: BeamSearch) -> list[Hypothesis]:
    """Returns all continuations up to MOST tokens, scored by the definition with one call of the
    model per token."""
    hypotheses = []
    rest = range(V - 1)
    for length in range(MOST + 1):
        for ids in itertools.product(rest, repeat=length):
            ends = length < MOST
            if settings.no_repeat_ngram and repeats(ids, settings.no_repeat_ngram):
                continue
            if ends and length < settings.min_tokens:
                continue
            score, steps = 0.0, [*ids, STOP] if ends else list(ids)
            for i, token in enumerate(steps):
                logits = log_probabilities(model, [*PROMPT.tokens, *steps[:i]])
                if i < settings.min_tokens:
                    logits[STOP] = -65504
                n = settings.no_repeat_ngram
                if n:
                    logits[[t for t in rest if repeats((*steps[:i], t), n)]] = -65504
                score += float(torch.log_softmax(logits, -1)[token])
            total = len(PROMPT.tokens) + len(steps)
            hypotheses.append(
                Hypothesis(list(ids), score / ((5 + total) / 6) ** settings.length_penalty)
            )
    return sorted(hypotheses, key=lambda h: -h.score)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram": 0},
        {"no_repeat_ngram": 0, "length_penalty": 0.0},
        {"no_repeat_ngram": 0, "length_penalty": 3.0},
        {"no_repeat_ngram": 2},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 0, "min_tokens": 3},
    ],
    ids=str,
)
def test_wide_beams_find_the_best_of_all_answers(built: GLM, settings: dict[str, Any]) -> None:
    wide = BeamSearch(num_beams=(V - 1) ** MOST, max_tokens=MOST, stop=(STOP,), **settings)
    found, truth = search(built, PROMPT, wide), every_hypothesis(built, wide)
    for ours, theirs in zip(found[:10], truth, strict=False):
        assert ours.tokens == theirs.tokens
        assert ours.score == pytest.approx(theirs.score, rel=1e-5)


def test_one_beam_is_greedy(built: GLM) -> None:
    settings = BeamSearch(num_beams=1, max_tokens=8, no_repeat_ngram=0)
    (best,) = search(built, PROMPT, settings)
    (greedy,) = generate(built, [PROMPT], Sampling(max_tokens=8, temperature=0))
    assert best.tokens == greedy.tokens


def test_narrow_beams_are_sorted_and_bounded(built: GLM) -> None:
    found = search(built, PROMPT, BeamSearch(num_beams=3, max_tokens=6, stop=(STOP,)))
    assert 1 <= len(found) <= 3
    scores = [h.score for h in found]
    assert scores == sorted(scores, reverse=True)
    assert all(math.isfinite(s) for s in scores)


def test_sampled_beams_follow_their_seed(built: GLM) -> None:
    def run(seed: int) -> list[Hypothesis]:
        return search(built, PROMPT, BeamSearch(num_beams=2, max_tokens=6, sample=True, seed=seed))

    assert run(1) == run(1)
    assert len({str([h.tokens for h in run(seed)]) for seed in range(6)}) > 1


def test_the_context_ends_a_search(built: GLM) -> None:
    found = search(built, PROMPT, BeamSearch(num_beams=2, no_repeat_ngram=0))
    assert {len(h.tokens) for h in found} == {12 - 3}


def test_bad_input(built: GLM) -> None:
    with pytest.raises(ConfigError, match=r"num_beams.*max_tokens"):
        BeamSearch(num_beams=0, max_tokens=-1)
    with pytest.raises(PromptError, match="empty"):
        search(built, Prompt(()), BeamSearch())
    broken = GLM(built.config)
    broken.load_state_dict({n: p.clone() for n, p in built.state_dict().items()})
    with torch.no_grad():
        broken.final_norm.weight[0] = torch.nan
    with pytest.raises(GenerationError, match=r"token 1: .* op add_layer_norm in the model"):
        search(broken, PROMPT, BeamSearch())
