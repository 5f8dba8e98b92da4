"""Computes from the weights what a verdict needs: correct log probabilities, controls, what known
mistakes would report, and whether the tokens can be draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from glm_core.errors import RolloutError
from glm_core.model.glm import GLM
from glm_core.rollout.causes import Cause, causes
from glm_core.rollout.controls import controls, wide
from glm_core.rollout.distribution import Draws, collect, draws, reported, sampled_from
from glm_core.rollout.engine import ROWS, trained
from glm_core.rollout.files import Array, Reply, Settings
from glm_core.rollout.ties import Reading

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What the weights say about the tokens of a rollout."""

    base: Array
    """correct log probabilities [tokens]"""
    controls: Array
    """[controls, tokens]: those of honest engines"""
    causes: list[Cause]
    others: Array
    """[alternatives, tokens]: changes of the correct log probabilities where routers choose
    otherwise at near ties, as honest engines may"""
    drawn: Draws | None = None


def gather(
    models: Mapping[int, GLM],
    replies: Sequence[Reply],
    settings: Settings,
    before: GLM | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Returns the evidence on replies by the models of their steps, in the working dtype. The
    weights before an update are those of the step before, where they are given, or `before`.
    Raises RolloutError for a step without weights, and for tokens that the model does not know."""
    show = progress or (lambda what, done, of: None)
    members = _members(models, replies)
    steps = list(members)
    parts = []
    for number, step in enumerate(steps):
        show(f"weights of step {step}", number, len(steps))
        earlier = max((s for s in models if s < step), default=None)
        old = before if earlier is None else models[earlier]
        parts.append(_of_step(models[step], [replies[i] for i in members[step]], settings, old))
    show("evidence", len(steps), len(steps))
    order = _order(replies, [i for s in steps for i in members[s]])
    return _joined(parts, order)


def trained_logprobs(
    models: Mapping[int, GLM], replies: Sequence[Reply], settings: Settings
) -> Array:
    """Returns the log probabilities of the training forward pass on the active backend. Raises
    RolloutError as `gather` does."""
    members = _members(models, replies)
    parts = []
    for step, numbers in members.items():
        own = [replies[i] for i in numbers]
        parts.append(collect(trained(models[step], own), own, [reported(settings)])[0])
    return np.concatenate(parts)[_order(replies, [i for n in members.values() for i in n])]


def _members(models: Mapping[int, GLM], replies: Sequence[Reply]) -> dict[int, list[int]]:
    """Returns the numbers of each step's replies. Raises RolloutError for a step without
    weights."""
    steps = sorted({r.step for r in replies})
    if missing := [s for s in steps if s not in models]:
        raise RolloutError(
            f"step {missing[0]}: no weights are given for it; known are those of "
            f"{', '.join(map(str, sorted(models)))}"
        )
    return {s: [i for i, r in enumerate(replies) if r.step == s] for s in steps}


def _of_step(
    model: GLM, replies: Sequence[Reply], settings: Settings, before: GLM | None
) -> Evidence:
    _require_known(model, replies)
    how, exact = reported(settings), wide(model)
    right = Reading(exact, replies, how)
    found, slack = controls(model, replies, how, right.calls)
    others = right.others(slack, layers=len(slack) // -(-len(replies) // ROWS))
    drawn = None
    if settings.temperature:  # unknown, or greedy: no draws
        drawn = draws(trained(exact, replies), replies, sampled_from(settings))
    known = list(causes(exact, replies, settings, how, right.logprobs, others, slack, before))
    return Evidence(right.logprobs, found, known, others, drawn)


def _require_known(model: GLM, replies: Sequence[Reply]) -> None:
    """Raises a RolloutError for tokens or a length that the model does not have."""
    c = model.config
    for number, r in enumerate(replies):
        if strange := [t for t in (*r.prompt, *r.tokens) if t >= c.vocab]:
            raise RolloutError(
                f"reply {number}: token {strange[0]} is not in the model's vocabulary of {c.vocab}"
                "; give the checkpoint that the tokens were drawn with"
            )
        if len(r.prompt) + len(r.tokens) > c.max_length:
            raise RolloutError(
                f"reply {number}: {len(r.prompt) + len(r.tokens)} tokens are more than the "
                f"model's max_length={c.max_length}; leave it out"
            )


def _order(replies: Sequence[Reply], members: Sequence[int]) -> Array:
    """Returns the places of the tokens, in the order of `replies`, in an array that has the tokens
    of these members one after the other."""
    sizes = [len(replies[i].tokens) for i in members]
    begins = dict(zip(members, np.cumsum([0, *sizes[:-1]]), strict=True))
    return np.concatenate([begins[i] + np.arange(len(r.tokens)) for i, r in enumerate(replies)])


def _joined(parts: Sequence[Evidence], order: Array) -> Evidence:
    """Returns the evidence of all steps as one. A mistake that cannot happen in some step adds
    nothing there; z-scores of draws are added up."""
    known = {(c.name, c.sentence): c for p in parts for c in p.causes}
    tables: dict[tuple[str, str], list[Array]] = {key: [] for key in known}
    flips: dict[tuple[str, str], list[Array]] = {key: [] for key in known}
    for part in parts:
        own = {(c.name, c.sentence): c for c in part.causes}
        for key, cause in known.items():
            nothing = np.zeros((len(cause.values), part.base.size))
            tables[key].append(own[key].deviations if key in own else nothing)
            flips[key].append(own[key].others if key in own else nothing[:0])
    joined = [
        dataclasses.replace(
            c,
            deviations=np.concatenate(tables[key], 1)[:, order],
            others=_padded(flips[key])[:, order],
        )
        for key, c in known.items()
    ]
    drawn = [p.drawn for p in parts if p.drawn is not None]
    total = None
    if drawn:
        total = Draws(*(float(sum(v) / len(drawn) ** 0.5) for v in zip(*drawn, strict=True)))
    return Evidence(
        np.concatenate([p.base for p in parts])[order],
        np.concatenate([p.controls for p in parts], 1)[:, order],
        joined,
        _padded([p.others for p in parts])[:, order],
        total,
    )


def _padded(tables: Sequence[Array]) -> Array:
    """Returns tables [A, tokens] side by side, with rows of zeros where one has fewer."""
    most = max(map(len, tables))
    return np.concatenate([np.pad(x, ((0, most - len(x)), (0, 0))) for x in tables], 1)
