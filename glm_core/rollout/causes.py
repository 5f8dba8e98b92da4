"""Tries known mistakes of engines: what would each of them report for these weights and tokens?

A cause is judged by its gain: by how much the sum of squared deviations falls once what the mistake
would add is taken out. Honest rounding has a gain too, which the controls show."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm_core.errors import ShapeError
from glm_core.model.glm import GLM
from glm_core.model.quantize import Quantization, undivided_widths
from glm_core.rollout import mistakes
from glm_core.rollout.distribution import OWN, Shaping, collect, sampled_from
from glm_core.rollout.engine import Variant, trained
from glm_core.rollout.files import Array, Reply, Settings, per_token
from glm_core.rollout.ties import Reading, settled

TEMPERATURES = np.exp(np.linspace(-0.7, 0.7, 29))
TOP_P = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
PENALTIES = np.array([0.8, 0.9, 0.95, 1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0])
CHUNKS = tuple(2**e for e in range(4, 14))
CODES = ((8, 0), (8, 32), (4, 32), (4, 0))
"""bits and group of the weights' codes that are tried"""


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """A mistake, and the deviations that it would add: one table, whose rows belong to the values
    of the mistake's parameter (one row where it has none)."""

    name: str
    sentence: str
    """`{}` stands for the value of the parameter"""
    deviations: Array
    """[values, tokens]"""
    others: Array
    """[alternatives, tokens]: what is added where routers that make the mistake choose otherwise at
    near ties"""
    values: tuple[float, ...] = (0.0,)
    between: bool = False
    """whether values between two rows are tried as well"""
    noise: bool = False
    """whether a deviation of the same size, but otherwise of no likeness, points to it too"""


class Fit(NamedTuple):
    """The best value of a cause's parameter for some deviations."""

    gain: float
    value: float
    deviation: Array
    """[tokens]"""


def fit(cause: Cause, deviation: Array, others: Array) -> Fit:
    """Returns the value of the parameter that leaves the smallest sum of squares, at first among
    the rows, then between the best one and its neighbours. others: what routers' honest choices
    add without the mistake."""
    rows = cause.deviations
    total = float((settled(deviation, others) ** 2).sum())
    left = (settled(deviation - rows, cause.others) ** 2).sum(1)
    best = int(left.argmin())
    found = Fit(total - float(left[best]), cause.values[best], rows[best])
    if not cause.between:
        return found
    for other in (best - 1, best + 1):
        if not 0 <= other < len(rows):
            continue
        slope = rows[other] - rows[best]
        rest = settled(deviation - rows[best], cause.others)
        share = float(np.clip(rest @ slope / max(slope @ slope, 1e-300), 0, 1))
        between = rows[best] + share * slope
        gain = total - float((settled(deviation - between, cause.others) ** 2).sum())
        if gain > found.gain:
            value = cause.values[best] + share * (cause.values[other] - cause.values[best])
            found = Fit(gain, value, between)
    return found


def causes(
    model: GLM,
    replies: Sequence[Reply],
    settings: Settings,
    how: Shaping,
    base: Array,
    others: Array,
    slack: Sequence[Tensor],
    before: GLM | None,
) -> Iterator[Cause]:
    """Yields every known mistake that can happen here. model: in a dtype beyond the working one;
    base: its log probabilities; others: what they may be at near ties; slack: see `controls`;
    before: the weights before the last update."""
    yield from _shapings(model, replies, settings, how, base, others)
    for name, sentence, variant, noise in _variants(model, replies, settings, before):
        try:
            wrong = Reading(model, replies, how, variant)
        except ShapeError:
            continue  # widths that these codes do not divide
        rows = (wrong.logprobs - base)[None]
        yield Cause(name, sentence, rows, wrong.flipped(slack), noise=noise)


def _shapings(
    model: GLM,
    replies: Sequence[Reply],
    settings: Settings,
    how: Shaping,
    base: Array,
    others: Array,
) -> Iterator[Cause]:
    """Yields what temperature, top-p and penalty do to the reported log probabilities, each tried
    by itself on what the settings state."""
    stated = sampled_from(settings)
    tried: list[tuple[str, str, list[float], bool, Callable[[float], Shaping]]] = [
        (
            "temperature",
            "temperature {:.3g} is folded into the reported log probabilities",
            sorted({*TEMPERATURES.tolist(), stated.temperature}),
            True,
            lambda x: how._replace(temperature=x),
        ),
        (
            "top-p",
            "top-p {:.3g} is folded into the reported log probabilities",
            sorted({*TOP_P, stated.top_p} - {1.0}),
            False,
            lambda x: how._replace(top_p=x),
        ),
        (
            "penalty",
            "the log probabilities are of logits with repetition penalty {:.3g}"
            + (f", and not with {how.repetition_penalty:.3g}" if how != OWN else ""),
            sorted({*PENALTIES.tolist(), stated.repetition_penalty}),
            True,
            lambda x: how._replace(repetition_penalty=x),
        ),
    ]
    if how != OWN:
        words = "the log probabilities are the model's own; the settings state others"
        tried.append(("processing", words, [0.0], False, lambda _: OWN))
    elif stated != OWN:
        words = "the log probabilities are those after penalty, temperature and top-p"
        tried.append(("processing", words, [0.0], False, lambda _: stated))
    shapings = [make(value) for _, _, values, _, make in tried for value in values]
    table = collect(trained(model, replies), replies, shapings) - base
    for name, sentence, values, between, _ in tried:
        rows, table = table[: len(values)], table[len(values) :]
        yield Cause(name, sentence, rows, others, tuple(values), between)


def _variants(
    model: GLM, replies: Sequence[Reply], settings: Settings, before: GLM | None
) -> Iterator[tuple[str, str, Variant, bool]]:
    """Yields (name, sentence, variant, whether its size alone points to it)."""
    own = model.embedding.dtype
    if own == torch.float64:  # in bfloat16 the head's result is rounded so by its contract
        yield "head", "the head computes in bfloat16", mistakes.low_head(), False
    if model.config.num_experts:
        yield "router", "the router computes in bfloat16", mistakes.low_router(), False
        for how in ("reversed", "rolled"):
            words = f"experts are added with the weights of others ({how})"
            yield "expert pairing", words, mistakes.other_pairing(how), False
        if own == torch.float64:
            words = "experts are added up in bfloat16"
            yield "expert sums", words, mistakes.other_order(torch.bfloat16), False
    yield from _of_prompts(replies, settings)
    if before is not None:
        early = copy.deepcopy(before).to(own)
        words = "the prompts' keys and values are those of the weights before the update"
        yield "stale cache", words, mistakes.stale_cache(early), False
        words = "the head is that of the weights before the update"
        yield "stale head", words, mistakes.stale_head(early), False
        words = "all weights are those before the update"
        yield "stale weights", words, mistakes.stale_weights(early), False
    for bits, group in CODES:
        if undivided_widths(model.config, Quantization(bits=bits, group=group)):
            continue
        words = f"the weights have {bits} bits, a scale for each {group or 'row'}"
        yield f"{bits}-bit weights", words, mistakes.quantised(bits, group), True


def _of_prompts(
    replies: Sequence[Reply], settings: Settings
) -> Iterator[tuple[str, str, Variant, bool]]:
    """Yields mistakes at the borders of chunks and of what a prefix cache held."""
    longest = max(len(r.prompt) for r in replies)
    for chunk in (settings.chunk,) if settings.chunk else CHUNKS:
        if chunk >= longest:
            continue
        for by, words in ((-1, "one place short"), (1, "one place too far"), (0, "from 0 again")):
            sentence = f"rotary positions count {words} from the prompt's place {chunk} on"
            yield "rope offset", sentence, mistakes.turned(chunk, by), False
    if per_token(replies)["cached"].any():
        for by, when in ((-1, "early"), (1, "late")):
            words = f"behind a prefix hit the mask ends one key {when}"
            yield "mask at a prefix hit", words, mistakes.moved_end(by), False
