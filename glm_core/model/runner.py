"""How a model and its cache take a step: prompts, long ones in pieces (prefill), and one token per
slot (decode).

Shapes: B rows, L tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.decode_step import DecodeStep, Rows
from glm_core.diagnose import nonfinite
from glm_core.errors import GenerationError, PromptError
from glm_core.model.cache import Cache
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt
from glm_core.model.stack import angles, stack

CHUNK = 512
"""tokens of a prompt that are read by one call"""


class DecodeRow(NamedTuple):
    """A token to feed: the last of a sequence that began `offset` places into its slot."""

    token: int
    prompt: Prompt
    place: int
    """in the sequence; its place in the slot is offset + place"""
    offset: int = 0
    idle: bool = False
    """sees nothing, and what it leaves at its place is to be written over"""


def idle(place: int) -> DecodeRow:
    """For a slot that has no token to feed, whose places from `place` on hold nothing."""
    return DecodeRow(0, Prompt((0,)), place, idle=True)


class Call(NamedTuple):
    """What the model is called with; shapes as GLM.forward, places [B, L] as Cache.window."""

    tokens: Tensor
    positions: Tensor
    key_start: Tensor
    key_end: Tensor
    places: Tensor
    first: int
    """slot of row 0"""


class Runner:
    """A model with a cache for `slots` sequences of at most `length` tokens, `chunk` tokens of a
    prompt at a time. The backend must be active around its calls."""

    def __init__(
        self, model: GLM, slots: int, length: int | None = None, chunk: int = CHUNK
    ) -> None:
        weight = model.embedding
        self.model, self.config, self.slots, self.chunk = model, model.config, slots, chunk
        model.eval()  # what adapters drop, they drop in training only
        self.length = min(length or model.config.max_length, model.config.max_length)
        self.cache = Cache(model.config, slots, self.length, weight.dtype, weight.device)
        self._last: Callable[[], Call]
        self._step_of: object = None
        self._step: DecodeStep | None = None

    def require_room(self, prompt: Prompt, offset: int = 0) -> None:
        """Raises PromptError for a prompt that is empty, too long, or of unknown ids."""
        if not prompt.tokens:
            raise PromptError("prompt: is empty; give at least one token")
        if len(prompt.tokens) + offset >= self.length:
            raise PromptError(
                f"prompt: {len(prompt.tokens) + offset} tokens leave no room to answer in a "
                f"context of {self.length}; shorten it to {self.length - 1} at most"
            )
        vocab = self.config.vocab
        if strange := [t for t in prompt.tokens if not 0 <= t < vocab]:
            raise PromptError(
                f"prompt: token {strange[0]} is not in the model's vocabulary of {vocab}; use the "
                "tokenizer it was trained with"
            )

    def prefill(self, first: int, prompts: Sequence[Prompt]) -> Tensor:
        """Logits [B, V] (float32) after each prompt; row b goes to slot `first` + b. Several
        prompts are padded on the left to one length; alone each gives the same up to rounding."""
        length = max(len(p.tokens) for p in prompts)
        for prompt in prompts:
            self.require_room(prompt, length - len(prompt.tokens))
        start = 0
        while True:
            logits, start = self.read(first, prompts, start)
            if start == length:
                return logits

    def read(self, first: int, prompts: Sequence[Prompt], start: int) -> tuple[Tensor, int]:
        """The next piece of prompts that are read up to place `start` of their slots: logits
        [B, V] after it, and where it ends. All of part A is one piece, however long: its tokens see
        those after them."""
        self._step_of = None  # the model may have been changed between two prompts
        length = max(len(p.tokens) for p in prompts)
        seen = max(length - len(p.tokens) + p.sep for p in prompts)
        end = min(max(start + self.chunk, seen if any(p.sep for p in prompts) else 0), length)
        rows = [_padded(prompt, length, start, end) for prompt in prompts]
        tokens, positions, begin, ends = (list(column) for column in zip(*rows, strict=True))
        places = [list(range(start, end))] * len(rows)
        call = _call(tokens, positions, begin, ends, places, first, self._device)
        return self._logits(call), end

    def decode(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits [B, V] (float32) after feeding row b's token to slot b: by the backend in one
        step if it takes those of such a model, else op by op."""
        asked, step = _rows(rows), self._whole_step()
        if step is None or len(rows) > step.max_rows or dispatch.intercepted():
            return self._logits(_step_call(asked, self._device))
        self._last = lambda: _step_call(asked, self._device)
        return step(asked, self.cache.memory)

    def _whole_step(self) -> DecodeStep | None:
        backend = dispatch.session().backend
        if self._step_of is not backend:
            made = stack(self.model, lambda: self._angles)
            self._step_of = backend
            self._step = None if made is None else backend.decode_step(made)
        return self._step

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor] | None:
        return angles(self.model, self.length)

    @property
    def last(self) -> Call:
        """What the latest step was called with."""
        return self._last()

    def explain(self, call: Call, step: int) -> GenerationError:
        """What to say of logits that are not finite: makes the same call again, watched."""
        with torch.no_grad(), nonfinite.watch(self.model) as seen:
            self._logits(call)
        return GenerationError(
            f"token {step}: the logits are not finite; first: {seen.op or 'op linear in the head'}"
            "; check the checkpoint, or use a wider dtype"
        )

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.device

    def _logits(self, call: Call) -> Tensor:
        self._last = lambda: call
        window = self.cache.window(call.first, call.places)
        with torch.inference_mode():
            hidden = self.model(
                call.tokens, call.positions, call.key_start, call.key_end, window
            )  # [B, L, D]
            logits = self.model.project(hidden[:, -1].contiguous())
        # a copy: outside of inference mode nobody may write into what it made
        return logits.to(torch.float32, copy=True)


def _padded(
    prompt: Prompt, length: int, start: int, end: int
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Tokens, positions, key_start and key_end at places [start, end) of a prompt with pads before
    it, `length` in all; a pad sees and shows nothing."""
    n = len(prompt.tokens)
    pads = length - n
    lead = max(min(pads, end) - start, 0)
    inside = range(max(start - pads, 0), max(end - pads, 0))
    return (
        [0] * lead + [prompt.tokens[i] for i in inside],
        [[0, 0]] * lead + [list(prompt.position(i)) for i in inside],
        [pads] * (end - start),
        [pads] * lead + [pads + min(prompt.key_end(i), n) for i in inside],
    )


def _rows(rows: Sequence[DecodeRow]) -> Rows:
    return Rows(
        [r.token for r in rows],
        [p for r in rows for p in r.prompt.position(r.place)],
        [r.offset for r in rows],
        [0 if r.idle else r.offset + r.prompt.key_end(r.place) for r in rows],
        [r.offset + r.place for r in rows],
    )


def _step_call(rows: Rows, device: torch.device) -> Call:
    """The same for the model."""
    pairs = zip(rows.positions[::2], rows.positions[1::2], strict=True)
    return _call(
        [[t] for t in rows.tokens],
        [[list(p)] for p in pairs],
        [[k] for k in rows.key_start],
        [[k] for k in rows.key_end],
        [[p] for p in rows.places],
        0,
        device,
    )


def _call(
    tokens: list[list[int]],
    positions: list[list[list[int]]],
    start: list[list[int]],
    end: list[list[int]],
    places: list[list[int]],
    first: int,
    device: torch.device,
) -> Call:
    return Call(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device).transpose(1, 2),  # [B, 2, L]
        torch.tensor(start, dtype=torch.int32, device=device),
        torch.tensor(end, dtype=torch.int32, device=device),
        torch.tensor(places, device=device),
        first,
    )
