"""Computes the logits of a rollout's tokens again, by the training forward pass or as an engine
does: prompts in chunks, then token by token.

Shapes: B rows, L tokens of a reply, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.dispatch import Interceptor
from glm_core.model.cache import Cache
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt
from glm_core.model.runner import CHUNK, DecodeRow, Runner, idle
from glm_core.rollout.files import Reply

ROWS = 16
"""replies that one training forward pass takes"""
Positions = Callable[[Reply, int], int]
"""returns a number for a token of a reply, by its index in prompt and reply"""


def plain_position(reply: Reply, place: int) -> int:
    """Returns the rotary position of a token."""
    return place


def plain_end(reply: Reply, place: int) -> int:
    """Returns the end of the keys that a token sees."""
    return place + 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What an engine does otherwise than the training forward pass, on purpose or by mistake."""

    model: Callable[[GLM], GLM] | None = None
    """makes the engine's model of the training's"""
    reads_prompts: GLM | None = None
    """the model that wrote the prompts' keys and values, where it is another one"""
    interceptor: Interceptor | None = None
    """computes op calls in place of the backend"""
    position: Positions = plain_position
    key_end: Positions = plain_end

    def intercepting(self) -> AbstractContextManager[None]:
        """Returns the context in which the ops are the engine's."""
        return nullcontext() if self.interceptor is None else dispatch.intercept(self.interceptor)

    def of(self, model: GLM) -> GLM:
        """Returns the engine's model."""
        return model if self.model is None else self.model(model)


PLAIN = Variant()


@torch.no_grad()
def trained(
    model: GLM, replies: Sequence[Reply], how: Variant = PLAIN, rows: int = ROWS
) -> Iterator[Tensor]:
    """Yields the logits [L, V] that drew each reply's tokens, in the model's dtype, by forward
    passes over whole sequences, `rows` at a time, padded on the right."""
    model = how.of(model)
    for first in range(0, len(replies), rows):
        group = replies[first : first + rows]
        with how.intercepting():
            hidden = _hidden(model, group, how)  # [B, S, D]
            for b, r in enumerate(group):
                begin = len(r.prompt) - 1
                yield model.project(hidden[b, begin : begin + len(r.tokens)].contiguous())


def _hidden(model: GLM, group: Sequence[Reply], how: Variant) -> Tensor:
    """Returns the hidden states of whole sequences. Where another model has read the prompts, the
    prompts' keys and values are that model's."""
    sequences = [(*r.prompt, *r.tokens) for r in group]
    size = max(map(len, sequences))
    device = model.embedding.device
    tokens = torch.tensor([[*s, *[0] * (size - len(s))] for s in sequences], device=device)
    places = range(size)
    row = torch.tensor([[how.position(r, p) for p in places] for r in group], device=device)
    positions = torch.stack((row, torch.zeros_like(row)), 1)  # [B, 2, S]
    ends = torch.tensor(
        [[how.key_end(r, p) for p in places] for r in group], dtype=torch.int32, device=device
    )
    begins = torch.zeros_like(ends)
    if how.reads_prompts is None:
        return _tensor(model(tokens, positions, begins, ends))
    cache = Cache(model.config, len(group), size, model.embedding.dtype, device)
    every = torch.arange(size, device=device).expand(len(group), size)
    states = model.embedding.new_zeros(len(group), size, model.config.hidden)
    for b, r in enumerate(group):
        # the prompt's last place belongs to the old weights, what follows to the new ones
        for reader, part in (
            (how.reads_prompts, slice(0, len(r.prompt))),
            (model, slice(len(r.prompt), size)),
        ):
            own = slice(b, b + 1)
            states[own, part] = _tensor(
                reader(
                    tokens[own, part],
                    positions[own, :, part],
                    begins[own, part],
                    ends[own, part],
                    cache.window(b, every[own, part]),
                )
            )
    return states


def _tensor(x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(x, Tensor)  # a whole model returns hidden states
    return x


@dataclasses.dataclass(frozen=True, slots=True)
class _EnginePrompt(Prompt):
    """A prompt that stands where the engine puts it."""

    reply: Reply | None = None
    how: Variant = PLAIN

    def position(self, place: int) -> tuple[int, int]:
        assert self.reply is not None
        return self.how.position(self.reply, place), 0

    def key_end(self, place: int) -> int:
        assert self.reply is not None
        return self.how.key_end(self.reply, place)


@torch.no_grad()
def generated(
    model: GLM,
    replies: Sequence[Reply],
    how: Variant = PLAIN,
    chunk: int = CHUNK,
    slots: int = ROWS,
) -> Iterator[Tensor]:
    """Yields the logits [L, V] float32 that draw each reply's tokens, as our generator computes
    them: the prompt in chunks, then one token a step for up to `slots` replies at once."""
    engine = how.of(model)
    for first in range(0, len(replies), slots):
        group = replies[first : first + slots]
        with how.intercepting():
            yield from _decoded(engine, group, how, chunk)


def _decoded(model: GLM, group: Sequence[Reply], how: Variant, chunk: int) -> Iterator[Tensor]:
    length = max(len(r.prompt) + len(r.tokens) for r in group)
    runner = Runner(model, len(group), length, chunk)
    reader = runner
    if how.reads_prompts is not None:
        reader = Runner(how.reads_prompts, len(group), length, chunk)
        reader.cache = runner.cache
    prompts = [_EnginePrompt(r.prompt, reply=r, how=how) for r in group]
    rows: list[list[Tensor]] = [[] for _ in group]
    for slot, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt.tokens):
            logits, start = reader.read(slot, [prompt], start)
        rows[slot].append(logits[0])
    for i in range(max(len(r.tokens) for r in group) - 1):
        fed = [
            DecodeRow(r.tokens[i], prompt, len(r.prompt) + i)
            if i < len(r.tokens) - 1
            else idle(len(r.prompt) + len(r.tokens) - 1)
            for r, prompt in zip(group, prompts, strict=True)
        ]
        logits = runner.decode(fed)
        for b, r in enumerate(group):
            if i < len(r.tokens) - 1:
                rows[b].append(logits[b])
    yield from map(torch.stack, rows)
