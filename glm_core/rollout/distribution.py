"""Computes the log probabilities of tokens from logits: the model's own, and after penalty,
temperature and top-p.

Shapes: L tokens of a reply, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm_core.ops.precision import wide as _wide
from glm_core.rollout.files import Array, Reply, Settings


class Shaping(NamedTuple):
    """What changes the model's own distribution before a token is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


OWN = Shaping()
"""the model's own distribution"""
MOST_VALUES = 2**22
"""logits that are shaped at once"""


def sampled_from(settings: Settings) -> Shaping:
    """Returns what the tokens were drawn from, as the settings state it."""
    return Shaping(settings.temperature or 1.0, settings.top_p, settings.repetition_penalty)


def reported(settings: Settings) -> Shaping:
    """Returns what the log probabilities belong to, as the settings state it."""
    if not settings.processed:
        return OWN
    drawn_from = sampled_from(settings)
    return drawn_from._replace(top_p=1.0) if settings.before_top_p else drawn_from


class Drawn(NamedTuple):
    """The tokens of some replies, and what they were drawn from."""

    logits: Tensor
    """[L, V]"""
    ids: Tensor
    """[L]"""
    seen: Tensor
    """[L, V]: whether a token stands in prompt or reply before"""


def drawn(logits: Iterable[Tensor], replies: Sequence[Reply]) -> Iterator[Drawn]:
    """Yields the tokens of replies in parts of about MOST_VALUES logits."""
    parts: list[Drawn] = []
    for x, r in zip(logits, replies, strict=True):
        ids = torch.tensor(r.tokens, device=x.device)
        seen = torch.zeros_like(x, dtype=torch.bool)
        seen[:, list(r.prompt)] = True
        for i, token in enumerate(r.tokens[:-1]):
            seen[i + 1 :, token] = True
        parts.append(Drawn(x, ids, seen))
        if sum(p.logits.numel() for p in parts) > MOST_VALUES:
            yield Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))
            parts = []
    if parts:
        yield Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))


def shaped(tokens: Drawn, how: Shaping) -> Tensor:
    """Returns the log probabilities [L, V] of the shaped distribution; -inf for tokens that top-p
    leaves out. The model's own are computed as the generator computes them, in float32 for logits
    below float64, so that equal logits give equal bits; others in float64."""
    if how == OWN:
        return _wide(tokens.logits).log_softmax(-1)
    x = tokens.logits.double()
    if how.repetition_penalty != 1:
        p = how.repetition_penalty
        x = torch.where(tokens.seen, torch.where(x > 0, x / p, x * p), x)
    x = (x / how.temperature).log_softmax(-1)
    if how.top_p >= 1:
        return x
    values, order = x.exp().sort(stable=True, dim=-1, descending=True)
    left_out = values.cumsum(-1) - values >= how.top_p
    dropped = torch.zeros_like(left_out).scatter(-1, order, left_out)
    return x.masked_fill(dropped, -torch.inf).log_softmax(-1)


def of_tokens(tokens: Drawn, how: Shaping = OWN) -> Array:
    """Returns the log probabilities [L] of the tokens. A token that top-p leaves out keeps the one
    it has without top-p: it was drawn, so rounding put it at the edge."""
    values = shaped(tokens, how).gather(-1, tokens.ids[:, None])[:, 0]
    if how.top_p < 1 and not bool(torch.isfinite(values).all()):
        whole = shaped(tokens, how._replace(top_p=1.0)).gather(-1, tokens.ids[:, None])[:, 0]
        values = torch.where(torch.isfinite(values), values, whole)
    return values.double().cpu().numpy()


def collect(
    logits: Iterable[Tensor], replies: Sequence[Reply], shapings: Sequence[Shaping] = (OWN,)
) -> Array:
    """Returns the log probabilities [shapings, tokens of all replies]."""
    columns = [
        np.stack([of_tokens(part, how) for how in shapings]) for part in drawn(logits, replies)
    ]
    return np.concatenate(columns, 1)


class Draws(NamedTuple):
    """Whether tokens can have been drawn from a distribution: two sums that are standard normal if
    they were. They are the scores of its temperature and of a repetition penalty, and so the
    sharpest tests of a small change of either."""

    temperature: float
    """sum of (-log p - entropy) / its standard deviation: positive where the tokens are less likely
    than those that the distribution draws"""
    penalty: float
    """the same for the size of the logits of tokens that stood in prompt or reply before: positive
    where such tokens are drawn too often"""


def draws(logits: Iterable[Tensor], replies: Sequence[Reply], how: Shaping) -> Draws:
    """Returns how the tokens of replies deviate from draws of the shaped distribution. Each token's
    term has mean zero given those before it, so the sums are martingales."""
    sums = np.zeros((2, 2))
    for part in drawn(logits, replies):
        logp = shaped(part, how).double()  # [L, V]
        repeated = part.logits.double().abs() * part.seen
        for row, score in enumerate((-logp.nan_to_num(neginf=0.0), repeated)):
            sums[row] += _deviation(score, logp.exp(), part.ids)
    return Draws(*(float(s / max(v, 1e-300) ** 0.5) for s, v in sums))


def _deviation(score: Tensor, p: Tensor, ids: Tensor) -> tuple[float, float]:
    """Returns the sum of the drawn tokens' scores minus their means, and the sum of their
    variances;  score and p [L, V]."""
    mean = (p * score).sum(-1)
    variance = (p * score.square()).sum(-1) - mean.square()
    own = score.gather(-1, ids[:, None])[:, 0]
    return float((own - mean).sum()), float(variance.clamp(min=0).sum())
