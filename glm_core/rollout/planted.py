"""Lists the mistakes of engines that are planted to measure the verdict, and honest differences;
makes the models and replies that they are planted in."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from glm_core.backends import registry
from glm_core.config import ModelConfig
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.rollout import mistakes
from glm_core.rollout.distribution import Shaping, collect, sampled_from
from glm_core.rollout.engine import PLAIN, Variant, generated
from glm_core.rollout.evidence import Evidence, gather
from glm_core.rollout.files import Array, Reply, Settings

NUM_REPLIES, NUM_TOKENS, PREFIX = 32, 24, 16
UPDATE = 1e-3
"""an update before which a cache or a head is stale: each weight moves by this much, as in a step
of Adam with this rate"""
_DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn": 96,
    "vocab": 96,
    "max_length": 128,
    "norm": "rms",
    "placement": "pre",
    "activation": "swiglu",
    "linear_bias": False,
    "init_std": 0.2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_ffn": 32,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
}
MODELS = {"dense": ModelConfig(**_DENSE), "experts": ModelConfig(**_DENSE, **_EXPERTS)}
Engine = Callable[["Case"], Array]
"""computes the log probabilities that an engine reports"""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A model with replies drawn from it, and the evidence on them."""

    name: str
    dtype: str
    model: GLM
    before: GLM
    replies: tuple[Reply, ...]
    settings: Settings
    evidence: Evidence

    def engine(
        self, how: Variant = PLAIN, shaping: Shaping | None = None, chunk: int = 64
    ) -> Array:
        """Returns what an engine reports that decodes all replies at once."""
        logits = generated(self.model, self.replies, how, chunk, NUM_REPLIES)
        own = sampled_from(self.settings) if self.settings.processed else Shaping()
        return collect(logits, self.replies, [shaping or own])[0]


class Plant(NamedTuple):
    """One planted mistake, or an honest difference."""

    label: str
    cause: str
    """the name that the verdict must give; empty: honest"""
    engine: Engine
    how: Callable[[Case], Variant] | None = None
    """what differs inside the model; None where only the report differs"""
    op: str = ""
    """the op at which the two paths part"""
    only: tuple[str, ...] = ()
    """kinds of models and dtypes that it is planted in; empty: all"""


def _inside(
    label: str,
    cause: str,
    op: str,
    how: Callable[[Case], Variant],
    *only: str,
    chunk: int = 64,
) -> Plant:
    return Plant(label, cause, lambda case: case.engine(how(case), chunk=chunk), how, op, only)


def _reported(label: str, cause: str, shaping: Shaping) -> Plant:
    return Plant(label, cause, lambda case: case.engine(shaping=shaping))


def plants() -> list[Plant]:
    """Returns every planted mistake."""
    m, rope, mask, codes = mistakes, "rope offset", "mask at a prefix hit", "quantized_linear"
    return [
        _inside("prompts' cache of older weights", "stale cache", "attention", _old_cache),
        _inside("all weights of before an update", "stale weights", "embedding", _old_weights),
        _inside("tied head not refreshed", "stale head", "linear", _old_head),
        _inside("head in bfloat16", "head", "linear", lambda c: m.low_head(), "float32"),
        _inside("router in bfloat16", "router", "route", lambda c: m.low_router(), "experts"),
        _inside("rope one short, chunks of 16", rope, "rope", lambda c: m.turned(16, -1), chunk=16),
        _inside(
            "rope one too far, chunks of 32", rope, "rope", lambda c: m.turned(32, 1), chunk=32
        ),
        _inside("rope from 0 in chunks of 16", rope, "rope", lambda c: m.turned(16, 0), chunk=16),
        _inside("mask one key short at a hit", mask, "attention", lambda c: m.moved_end(-1)),
        _inside("mask one key long at a hit", mask, "attention", lambda c: m.moved_end(1)),
        _inside("experts' weights reversed", "expert pairing", "unpermute", _reversed, "experts"),
        _inside(
            "experts added in bfloat16", "expert sums", "unpermute", _low_sums, "experts", "float32"
        ),
        _inside("int8, a scale per row", "8-bit weights", codes, lambda c: m.quantised(8, 0)),
        _inside("int8, groups of 32", "8-bit weights", codes, lambda c: m.quantised(8, 32)),
        _inside("int4, groups of 32", "4-bit weights", codes, lambda c: m.quantised(4, 32)),
        _reported("temperature 0.9 folded in", "temperature", Shaping(0.9)),
        _reported("temperature 1.1 folded in", "temperature", Shaping(1.1)),
        _reported("top-p 0.9 folded in", "top-p", Shaping(top_p=0.9)),
        _reported("top-p 0.95 folded in", "top-p", Shaping(top_p=0.95)),
        _reported("penalty 1.1 in the report alone", "penalty", Shaping(repetition_penalty=1.1)),
    ]


def _old_cache(case: Case) -> Variant:
    return mistakes.stale_cache(case.before)


def _old_weights(case: Case) -> Variant:
    return mistakes.stale_weights(case.before)


def _old_head(case: Case) -> Variant:
    return mistakes.stale_head(case.before)


def _reversed(case: Case) -> Variant:
    return mistakes.other_pairing("reversed")


def _low_sums(case: Case) -> Variant:
    return mistakes.other_order(torch.bfloat16)


def honest() -> list[Plant]:
    """Returns every honest difference."""
    on_cpu: Engine = lambda case: _on("cpu", case)  # noqa: E731
    return [
        _inside("chunks of 16", "", "", lambda c: PLAIN, chunk=16),
        _inside("chunks of 24", "", "", lambda c: PLAIN, chunk=24),
        Plant("one reply at a time", "", _alone),
        Plant("kernels of the cpu backend", "", on_cpu),
        _inside("experts added backwards", "", "", lambda c: mistakes.other_order(), "experts"),
        _inside(
            "experts added in bfloat16, as in bfloat16", "", "", _low_sums, "experts", "bfloat16"
        ),
        Plant("head in bfloat16, as in bfloat16", "", _low_head, only=("bfloat16",)),
    ]


def _low_head(case: Case) -> Array:
    return case.engine(mistakes.low_head())


def _on(backend: str, case: Case) -> Array:
    with registry.use(backend):
        return case.engine()


def _alone(case: Case) -> Array:
    logits = generated(case.model, case.replies, PLAIN, 64, 1)
    return collect(logits, case.replies)[0]


def make_case(
    kind: str,
    dtype: str,
    seed: int,
    settings: Settings | None = None,
    drawn: Sampling | None = None,
    num_replies: int = NUM_REPLIES,
) -> Case:
    """Returns a model with random weights and replies drawn from it: half of the prompts begin
    alike and behind a prefix hit. drawn: how the tokens are drawn, else as the settings state."""
    working: torch.dtype = getattr(torch, dtype)
    config, source = MODELS[kind], random.Random(seed)
    model = GLM(config).init_weights(seed)
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in before.parameters():
            p.add_(UPDATE * torch.randn(p.shape, generator=generator).sign())
    model, before = model.to(working), before.to(working)
    prefix = [source.randrange(config.vocab) for _ in range(PREFIX)]
    prompts = []
    for i in range(num_replies):
        tail = [source.randrange(config.vocab) for _ in range(source.randrange(4, 30))]
        prompts.append(tuple(prefix + tail if i % 2 else tail))
    s = settings or Settings(dtype=dtype, temperature=1.0)
    base = drawn or Sampling(repetition_penalty=s.repetition_penalty)
    how = [
        dataclasses.replace(base, max_tokens=NUM_TOKENS, seed=seed * 1000 + i, logprobs=1)
        for i in range(num_replies)
    ]
    done = generate(model, [causal(p) for p in prompts], how, slots=num_replies)
    replies = tuple(
        Reply(p, tuple(g.tokens), tuple(x.logprob for x in g.logprobs), 0, PREFIX if i % 2 else 0)
        for i, (p, g) in enumerate(zip(prompts, done, strict=True))
    )
    evidence = gather({0: model}, replies, s, before)
    return Case(f"{kind}-{dtype}-{seed}", dtype, model, before, replies, s, evidence)
