"""Draws the next token: penalties and biases, temperature, top-k, top-p, then min-p, the order of
GLM-130B and transformers.

Shapes: B rows, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glm_core.config import check, positive


class Constraint(Protocol):
    """What one sequence may still say, such as a grammar's next tokens."""

    def restrict(self, logits: Tensor) -> None:
        """Sets the logits [V] of forbidden tokens to minus infinity, in place."""

    def accept(self, token: int) -> None:
        """Goes on after this token."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one sequence is continued, and until when."""

    max_tokens: int = 256
    """new tokens; the end of the context may come first"""
    temperature: float = 1.0
    """0 = greedy"""
    top_k: int = 0
    """0 = all"""
    top_p: float = 1.0
    """keep the fewest most likely tokens that together have at least this probability"""
    seed: int = 0
    """seed of this sequence alone; other sequences of the batch do not matter"""
    min_tokens: int = 0
    """new tokens before a stop token is allowed"""
    stop: tuple[int, ...] = ()
    """tokens that end the sequence and are not part of it"""
    min_p: float = 0.0
    """keep the tokens that have at least this share of the most likely one's probability"""
    repetition_penalty: float = 1.0
    """logits of tokens in prompt or reply are divided by it, negative ones multiplied (Keskar et
    al. 2019)"""
    presence_penalty: float = 0.0
    """subtracted from the logits of tokens in the reply"""
    frequency_penalty: float = 0.0
    """subtracted from the logits of tokens in the reply, as often as they are in it"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """tokens and what is added to their logits"""
    logprobs: int | None = None
    """how many of the most likely tokens are reported with each token; None: no report"""
    constraint: Constraint | None = None
    """of this sequence alone; it changes with every token"""

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` can change a logit."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.min_tokens)
        others = (self.logit_bias, self.constraint)
        return self.repetition_penalty != 1 or any(penalties) or any(map(bool, others))

    def __post_init__(self) -> None:
        check(
            self,
            positive("max_tokens"),
            {
                "temperature": 0 <= self.temperature <= 100 or "must lie in [0, 100]",
                "top_k": self.top_k >= 0 or "must be 0 (all) or positive",
                "top_p": 0 < self.top_p <= 1 or "must lie in (0, 1]",
                "min_tokens": 0 <= self.min_tokens <= self.max_tokens
                or f"must lie in [0, max_tokens={self.max_tokens}]",
                "min_p": 0 <= self.min_p <= 1 or "must lie in [0, 1]",
                "repetition_penalty": self.repetition_penalty > 0 or "must be positive",
                "seed": 0 <= self.seed < 1 << 63 or "must lie in [0, 2^63)",
            },
        )


class TokenLogprob(NamedTuple):
    """The model's own log probability of a token, before penalties, temperature and all else."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """the most likely tokens with theirs"""


def report(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Returns the log probabilities of a token and of the `top` most likely ones, by logits [V]."""
    values = logits.float().log_softmax(-1)
    most, ids = values.topk(min(top, len(values)))
    pairs = tuple(zip(ids.tolist(), most.tolist(), strict=True))
    return TokenLogprob(token, float(values[token]), pairs)


def adjust(logits: Tensor, s: Sampling, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Applies penalties, biases and min_tokens to logits [V] in place. tokens: the reply so far."""
    if s.repetition_penalty != 1:
        ids = torch.tensor(sorted({*prompt, *tokens} & set(range(len(logits)))))
        ids = ids.to(logits.device)
        seen, penalty = logits[ids], s.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if tokens and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(tokens, device=logits.device)
        counts = torch.bincount(ids, minlength=len(logits)).to(logits.dtype)
        logits -= s.presence_penalty * (counts > 0) + s.frequency_penalty * counts
    for token, bias in s.logit_bias:
        logits[token] += bias
    if len(tokens) < s.min_tokens:
        logits[list(s.stop)] = -torch.inf
    if s.constraint is not None:
        s.constraint.restrict(logits)


def choose(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Returns one token for each row of logits [B, V]. draws: one number per row, uniform in [0,
    1). A row depends on its own settings and draw alone."""
    chosen: list[int] = logits.argmax(-1).tolist()
    rows = [i for i, s in enumerate(settings) if s.temperature > 0 and s.top_k != 1]
    if rows:
        drawn = _drawn(logits[rows], [settings[i] for i in rows], [draws[i] for i in rows])
        for i, token in zip(rows, drawn, strict=True):
            chosen[i] = token
    return chosen


def _drawn(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Returns the token into whose share of [0, 1) the draw falls, with the most likely tokens
    first."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=wide.device)[:, None]

    vocab = logits.shape[-1]
    wide = _in_float64(logits)
    scaled = wide / column([s.temperature for s in settings])
    values, order = scaled.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(vocab, device=wide.device)
    kept = rank < column([s.top_k or vocab for s in settings])
    weights = torch.softmax(values.masked_fill(~kept, -torch.inf), -1)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill(before >= column([s.top_p for s in settings]), 0.0)
    weights = weights.masked_fill(weights < column([s.min_p for s in settings]) * weights[:, :1], 0)
    share = weights.cumsum(-1)
    place = (share <= column(list(draws)) * share[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, place.clamp(max=vocab - 1))[:, 0].tolist()


def _in_float64(x: Tensor) -> Tensor:
    """Returns the tensor in float64: on its device, or on the CPU where the device has none."""
    try:
        return x.double()
    except (TypeError, NotImplementedError):  # mps raises TypeError
        return x.cpu().double()
