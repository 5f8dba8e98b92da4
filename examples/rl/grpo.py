"""GRPO on a toy task: a small GLM learns to write digits backwards, from rewards alone.

Rollouts come from our generator, updates from our optimizer, and both use the same weights in
memory. What is watched: on the weights that drew the tokens, every importance ratio should be 1. In
exact arithmetic (docs/exact.md) it is, to the bit, which is asserted in every step."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core.align.charts import Series, chart
from glm_core.backends import registry
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.rollout import files
from glm_core.rollout.files import Reply, Rollout, Settings
from glm_core.training import checkpoint
from glm_core.training.optimizer import Optimizer, learning_rate

DIGITS, BEGIN, EQUALS, VOCAB = 10, 10, 11, 16
"""tokens 0 to 9 are digits"""
CLIP = 0.2
"""ratios beyond 1 +- CLIP have no gradient (Schulman et al. 2017, eq. 7)"""
COLORS = ("#b00020", "#00796b", "#1a4f8b", "#9a5b00")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """How much is drawn and learned."""

    digits: int = 2
    prompts: int = 8
    """different prompts of a step"""
    group: int = 8
    """replies to each of them, which are compared with each other"""
    updates: int = 2
    """optimizer steps on each step's replies: the first is on-policy"""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            steps=120, lr=3e-3, min_lr=2e-4, warmup_steps=5, weight_decay=0.0
        )
    )

    def model(self) -> ModelConfig:
        """Returns the model's sizes."""
        return ModelConfig(
            num_layers=2,
            hidden=64,
            num_heads=4,
            ffn=128,
            vocab=VOCAB,
            max_length=max(16, 2 + 2 * self.digits),
            norm="rms",
            placement="pre",
            activation="swiglu",
            linear_bias=False,
        )


class Step(NamedTuple):
    """The figures of one step."""

    reward: float
    """mean share of right digits"""
    mean_deviation: float
    """mean |d logprob| on the weights that drew the tokens"""
    max_ratio: float
    """largest |ratio - 1| there"""
    equal: float
    """share of ratios that are 1 to the bit"""
    late_ratio: float
    """largest |ratio - 1| before the step's last update: how far the policy has moved on purpose"""


def prompts_of(task: Task, source: random.Random) -> list[tuple[int, ...]]:
    """Returns a step's prompts, each `group` times."""
    drawn = [
        (BEGIN, *(source.randrange(DIGITS) for _ in range(task.digits)), EQUALS)
        for _ in range(task.prompts)
    ]
    return [prompt for prompt in drawn for _ in range(task.group)]


def reward(prompt: Sequence[int], reply: Sequence[int]) -> float:
    """Returns the share of digits that are those of the prompt, backwards."""
    wanted = list(reversed(prompt[1:-1]))
    return sum(a == b for a, b in zip(reply, wanted, strict=True)) / len(wanted)


def draw(model: GLM, task: Task, source: random.Random, step: int) -> tuple[Reply, ...]:
    """Returns the step's replies, drawn by the generator."""
    prompts = prompts_of(task, source)
    how = [
        Sampling(max_tokens=task.digits, seed=source.randrange(1 << 40), logprobs=1)
        for _ in prompts
    ]
    done = generate(model, [causal(p) for p in prompts], how, padded=True)
    return tuple(
        Reply(p, tuple(g.tokens), tuple(x.logprob for x in g.logprobs), step)
        for p, g in zip(prompts, done, strict=True)
    )


def logprobs(model: GLM, replies: Sequence[Reply]) -> Tensor:
    """Returns the training forward pass's log probabilities of the replies' tokens [B, R]."""
    tokens = torch.tensor([[*r.prompt, *r.tokens[:-1]] for r in replies])  # [B, L]
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    positions = torch.stack((places, torch.zeros_like(places)), 1)  # [B, 2, L]
    end = (places + 1).int()
    first = len(replies[0].prompt) - 1
    logits = model.logits(tokens, positions, torch.zeros_like(end), end)[:, first:]  # [B, R, V]
    ids = torch.tensor([r.tokens for r in replies])[..., None]
    return logits.float().log_softmax(-1).gather(-1, ids)[..., 0]


def advantages(task: Task, rewards: Tensor) -> Tensor:
    """Returns each reply's reward against its group's (Shao et al. 2024, GRPO, section 4.1)."""
    by_group = rewards.view(task.prompts, task.group)
    centred = by_group - by_group.mean(1, keepdim=True)
    return (centred / (by_group.std(1, keepdim=True) + 1e-4)).flatten()


class Trained(NamedTuple):
    """What one run leaves behind."""

    steps: list[Step]
    masters: dict[str, Tensor]
    """the last weights in float32"""
    replies: tuple[Reply, ...]
    """replies that these weights drew, in the working dtype"""


def train(task: Task, dtype: str, seed: int, exact: bool = False) -> Trained:
    """Trains one model from random weights. exact: in exact arithmetic, where every on-policy ratio
    must be 1 to the bit."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    model = GLM(task.model()).init_weights(seed)
    masters = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = model.to(getattr(torch, dtype))
    optimizer = Optimizer(model, task.train)
    optimizer.load_masters(masters)
    steps = []
    with registry.use("cpu", exact=exact):
        for number in range(1, task.train.steps + 1):
            replies = draw(model, task, source, number)
            drawn = torch.tensor([r.logprobs for r in replies])  # [B, R]
            rewards = torch.tensor([reward(r.prompt, r.tokens) for r in replies])
            better = advantages(task, rewards)[:, None]  # [B, 1]
            found = []
            for _ in range(task.updates):
                model.zero_grad(set_to_none=True)
                deviation = logprobs(model, replies) - drawn
                ratio = deviation.exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                (-torch.minimum(ratio * better, clipped * better).mean()).backward()
                optimizer.step(learning_rate(task.train, number))
                found.append((deviation.detach(), ratio.detach()))
            (first, ratio), (_, late) = found[0], found[-1]
            assert not exact or bool((ratio == 1).all()), f"step {number}: a ratio is not 1"
            steps.append(
                Step(
                    float(rewards.mean()),
                    float(first.abs().mean()),
                    float((ratio - 1).abs().max()),
                    float((ratio == 1).float().mean()),
                    float((late - 1).abs().max()),
                )
            )
        return Trained(steps, optimizer.master, draw(model, task, source, 0))


def save(folder: Path, task: Task, trained: Trained, settings: Settings) -> None:
    """Writes the last weights as a checkpoint, and the replies they drew as a rollout, both as
    `glm-core align rollout` reads them."""
    data = DataConfig(length=task.model().max_length, vocab=VOCAB)  # rewards take its place
    facts = {"config": to_dict(RunConfig(model=task.model(), train=task.train, data=data))}
    tensors = {f"master.{name}": value for name, value in trained.masters.items()}
    checkpoint.save(folder / checkpoint.FOLDER, task.train.steps, tensors, facts, keep=1)
    files.save(Rollout(settings, trained.replies), folder / "rollout.jsonl")


def page(runs: dict[str, list[list[Step]]]) -> str:
    """Returns an HTML page with reward, ratio and drift of all runs; the seeds of one way to
    compute have one colour."""

    def of(field: str) -> list[Series]:
        return [
            Series(
                "" if seed else name,
                range(1, len(steps) + 1),
                [getattr(s, field) for s in steps],
                color,
                width=1.0,
            )
            for (name, seeds), color in zip(runs.items(), COLORS, strict=False)
            for seed, steps in enumerate(seeds)
        ]

    charts = [
        chart("reward: share of right digits", of("reward")),
        chart(
            "mean |d logprob| on the weights that drew the tokens", of("mean_deviation"), log=True
        ),
        chart("largest |ratio - 1| on these weights", of("max_ratio"), log=True),
        chart("largest |ratio - 1| before the last update of a step", of("late_ratio"), log=True),
    ]
    style = "body{font-family:sans-serif;max-width:760px;margin:auto}.legend i{padding:0 8px}"
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{''.join(charts)}"


def summary(steps: Sequence[Step]) -> str:
    """Returns a run's figures in words."""

    def mean(field: str) -> float:
        return sum(getattr(s, field) for s in steps) / len(steps)

    last = [s.reward for s in steps[-10:]]
    return (
        f"reward {steps[0].reward:.2f} -> {sum(last) / len(last):.2f}; on-policy mean |d logprob| "
        f"{mean('mean_deviation'):.1e}, largest |ratio - 1| {max(s.max_ratio for s in steps):.1e}, "
        f"{mean('equal'):.0%} of ratios are 1 to the bit"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Trains with every dtype, arithmetic and seed, and writes the figures and the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--arithmetic", default="fast,exact", help="fast, exact (docs/exact.md)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    args = parser.parse_args(words)
    base = Task()
    task = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=args.steps))
    runs: dict[str, list[list[Step]]] = {}
    for dtype, how in itertools.product(args.dtypes.split(","), args.arithmetic.split(",")):
        for seed in range(1, args.seeds + 1):
            trained = train(task, dtype, seed, exact=how == "exact")
            runs.setdefault(f"{dtype} {how}", []).append(trained.steps)
            folder = args.out / f"{dtype}-{how}-{seed}"
            save(folder, task, trained, Settings(engine=how, dtype=dtype, temperature=1.0))
            judge = f"glm-core align rollout {folder / 'rollout.jsonl'} --model {folder}"
            judge += " --exact" if how == "exact" else ""
            text = f"{dtype} {how}, seed {seed}: {summary(trained.steps)}\n  judge it: {judge}"
            print(text, flush=True)
    plain = {n: [[s._asdict() for s in steps] for steps in seeds] for n, seeds in runs.items()}
    (args.out / "steps.json").write_text(json.dumps(plain), encoding="utf-8")
    (args.out / "report.html").write_text(page(runs), encoding="utf-8")
    print(f"wrote {args.out / 'report.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
