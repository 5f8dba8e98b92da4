"""Measures the verdict on rollouts: how many planted mistakes of engines are found and named, and
how many honest differences are acquitted."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
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
from glm_core.rollout.evidence import Evidence, Progress, gather
from glm_core.rollout.files import Array, Reply, Settings
from glm_core.rollout.paths import bisect
from glm_core.rollout.verdict import judge

TARGET = 0.95
"""share of the planted mistakes that must be found, and of those found that must be named"""
NUM_REPLIES, NUM_TOKENS, PREFIX = 32, 12, 16
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
    only: tuple[str, ...] = ()
    """kinds of models and dtypes that it is planted in; empty: all"""


def _inside(
    label: str,
    cause: str,
    how: Callable[[Case], Variant],
    *only: str,
    chunk: int = 64,
) -> Plant:
    return Plant(label, cause, lambda case: case.engine(how(case), chunk=chunk), how, only)


def _reported(label: str, cause: str, shaping: Shaping, *only: str) -> Plant:
    return Plant(label, cause, lambda case: case.engine(shaping=shaping), None, only)


def plants() -> list[Plant]:
    """Returns every planted mistake."""
    m = mistakes
    rope = "rope offset"
    mask = "mask at a prefix hit"
    return [
        _inside(
            "prompts' cache from before an update", "stale cache", lambda c: m.stale_cache(c.before)
        ),
        _inside(
            "all weights from before an update",
            "stale weights",
            lambda c: m.stale_weights(c.before),
        ),
        _inside("tied head not refreshed", "stale head", lambda c: m.stale_head(c.before)),
        _inside("head in bfloat16", "head", lambda c: m.low_head(), "float32"),
        _inside("router in bfloat16", "router", lambda c: m.low_router(), "experts"),
        _inside(
            "rope one short from the second chunk of 16", rope, lambda c: m.turned(16, -1), chunk=16
        ),
        _inside(
            "rope one too far from the second chunk of 32",
            rope,
            lambda c: m.turned(32, 1),
            chunk=32,
        ),
        _inside("rope from 0 again in each chunk of 16", rope, lambda c: m.turned(16, 0), chunk=16),
        _inside("mask one key short behind a prefix hit", mask, lambda c: m.hidden_key()),
        _inside("mask one key long behind a prefix hit", mask, lambda c: m.seen_key()),
        _inside(
            "experts' weights in reverse",
            "expert pairing",
            lambda c: m.other_pairing("reversed"),
            "experts",
        ),
        _inside(
            "experts added up in bfloat16",
            "expert sums",
            lambda c: m.other_order(torch.bfloat16),
            "experts",
            "float32",
        ),
        _inside("int8, a scale per row", "8-bit weights", lambda c: m.quantised(8, 0)),
        _inside("int8, groups of 32", "8-bit weights", lambda c: m.quantised(8, 32)),
        _inside("int4, groups of 32", "4-bit weights", lambda c: m.quantised(4, 32)),
        _reported("temperature 0.9 folded in", "temperature", Shaping(0.9)),
        _reported("temperature 1.03 folded in", "temperature", Shaping(1.03)),
        _reported("top-p 0.9 folded in", "top-p", Shaping(top_p=0.9)),
        _reported("top-p 0.95 folded in", "top-p", Shaping(top_p=0.95)),
        _reported("penalty 1.1 in the report alone", "penalty", Shaping(repetition_penalty=1.1)),
    ]


def honest() -> list[Plant]:
    """Returns every honest difference."""
    on_cpu: Engine = lambda case: _on("cpu", case)  # noqa: E731
    return [
        _inside("chunks of 16", "", lambda c: PLAIN, chunk=16),
        _inside("chunks of 24", "", lambda c: PLAIN, chunk=24),
        Plant("one reply at a time", "", lambda c: _alone(c)),
        Plant("kernels of the cpu backend", "", on_cpu),
        _inside(
            "experts added from the last to the first",
            "",
            lambda c: mistakes.other_order(),
            "experts",
        ),
    ]


def _on(backend: str, case: Case) -> Array:
    with registry.use(backend):
        return case.engine()


def _alone(case: Case) -> Array:
    logits = generated(case.model, case.replies[:NUM_REPLIES], PLAIN, 64, 1)
    return collect(logits, case.replies)[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one plant in one case."""

    case: str
    label: str
    cause: str
    found: bool
    named: str
    share: float
    place: str
    """where the two paths part"""


@dataclasses.dataclass(frozen=True, slots=True)
class Campaign:
    """All outcomes."""

    rows: list[Row]

    @property
    def planted(self) -> list[Row]:
        """Returns the rows of mistakes."""
        return [r for r in self.rows if r.cause]

    @property
    def reached(self) -> bool:
        """Whether enough are found and named, and nothing honest is convicted."""
        rows = self.planted
        found = sum(r.found for r in rows)
        named = sum(r.named == r.cause for r in rows)
        alarms = [r for r in self.rows if not r.cause and r.found]
        return min(found, named) >= TARGET * len(rows) and not alarms

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"rows": [dataclasses.asdict(r) for r in self.rows], "reached": self.reached}

    def text(self) -> str:
        """Returns a line for each plant, with how often it was found and named, and a summary."""
        lines = []
        for label in dict.fromkeys(r.label for r in self.rows):
            rows = [r for r in self.rows if r.label == label]
            found = sum(r.found for r in rows)
            outcome = f"{found} of {len(rows)} found"
            if rows[0].cause:
                outcome += f", {sum(r.named == r.cause for r in rows)} named"
                parts = sum(bool(r.place) for r in rows)
                outcome += f", {parts} placed" if parts else ""
            else:
                outcome = f"{len(rows) - found} of {len(rows)} acquitted"
            lines.append(f"{label:48} {outcome}")
        rows = self.planted
        found, named = sum(r.found for r in rows), sum(r.named == r.cause for r in rows)
        alarms = sum(r.found for r in self.rows if not r.cause)
        total = len(self.rows) - len(rows)
        lines.append(
            f"{found} of {len(rows)} planted mistakes found, {named} named; "
            f"{alarms} of {total} honest differences convicted"
        )
        return "\n".join(lines)


def make_case(
    kind: str,
    dtype: str,
    seed: int,
    settings: Settings | None = None,
    drawn: Sampling | None = None,
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
    for i in range(NUM_REPLIES):
        tail = [source.randrange(config.vocab) for _ in range(source.randrange(4, 30))]
        prompts.append(tuple(prefix + tail if i % 2 else tail))
    s = settings or Settings(dtype=dtype)
    base = drawn or Sampling(
        temperature=s.temperature, top_p=s.top_p, repetition_penalty=s.repetition_penalty
    )
    how = [
        dataclasses.replace(base, max_tokens=NUM_TOKENS, seed=seed * 1000 + i, logprobs=1)
        for i in range(NUM_REPLIES)
    ]
    done = generate(model, [causal(p) for p in prompts], how, slots=NUM_REPLIES)
    replies = tuple(
        Reply(p, tuple(g.tokens), tuple(x.logprob for x in g.logprobs), 0, PREFIX if i % 2 else 0)
        for i, (p, g) in enumerate(zip(prompts, done, strict=True))
    )
    evidence = gather({0: model}, replies, s, before)
    return Case(f"{kind}-{dtype}-{seed}", dtype, model, before, replies, s, evidence)


def judged(case: Case, plant: Plant, with_paths: bool = False) -> Row:
    """Returns the outcome of one plant."""
    e = case.evidence
    outcome = judge(plant.engine(case), e.base, e.controls, case.replies, e.causes, e.drawn)
    place = ""
    if with_paths and plant.how is not None:
        place = bisect({0: case.model}, case.replies, how=plant.how(case)).text()
        place = "" if "every op call agrees" in place else place
    return Row(
        case.name,
        plant.label,
        plant.cause,
        outcome.verdict == "diverged",
        outcome.cause,
        outcome.share,
        place,
    )


def penalised(kind: str, dtype: str, seed: int) -> Iterator[Row]:
    """Yields outcomes where the settings state a penalty of 1.2: reported without it, and drawn
    without it."""
    stated = Settings(dtype=dtype, repetition_penalty=1.2, processed=True)
    case = make_case(kind, dtype, seed, stated)
    yield judged(case, Plant("as stated, with a penalty", "", lambda c: c.engine()))
    raw = Plant(
        "reported from logits before a penalty", "processing", lambda c: c.engine(shaping=Shaping())
    )
    yield judged(case, raw)
    case = make_case(kind, dtype, seed, stated, Sampling())
    yield judged(case, Plant("sampled from logits before a penalty", "draws", lambda c: c.engine()))


def campaign(
    kinds: Sequence[str] = tuple(MODELS),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    seeds: Sequence[int] = (1, 2),
    with_paths: bool = True,
    progress: Progress | None = None,
) -> Campaign:
    """Judges every plant in every case it applies to."""
    rows: list[Row] = []
    cases = [(k, d, s) for s in seeds for k in kinds for d in dtypes]
    for number, (kind, dtype, seed) in enumerate(cases):
        if progress:
            progress(f"{kind} {dtype}", number, len(cases))
        case = make_case(kind, dtype, seed)
        rows += [
            judged(case, plant, with_paths)
            for plant in [*plants(), *honest()]
            if all(only in (kind, dtype) for only in plant.only)
        ]
        rows += penalised(kind, dtype, seed)
    return Campaign(rows)
