"""Runs a model with its KV cache: prompts, long ones in chunks (prefill), then one token per slot
and step (decode).

Shapes: B rows, L tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.config import ModelConfig
from glm_core.decode_step import DecodeStep, Rows
from glm_core.diagnose import nonfinite
from glm_core.errors import ConfigError, GenerationError, PromptError
from glm_core.model.cache import Cache
from glm_core.model.glm import GLM
from glm_core.model.loras import LoRAs
from glm_core.model.prompt import Prompt
from glm_core.model.stack import angles, stack
from glm_core.session import KernelProvider
from glm_core.spec import Support, unsupported

CHUNK = 512
"""tokens of a prompt read by one call"""
MOST_DRAFTS = 7
"""tokens that may be drafted at a time: the `cpu` backend keeps the bits of up to 8 rows a call"""


class DecodeRow(NamedTuple):
    """The token that a decode step feeds to one slot: the last token of its sequence."""

    token: int
    prompt: Prompt
    """the sequence's prompt, which knows positions and mask"""
    place: int
    """the token's index in the sequence; its key and value go to place offset + place of the
    slot"""
    offset: int = 0
    """where in the slot the sequence begins (behind left padding)"""
    idle: bool = False
    """the slot has no token to feed: the row sees nothing and its result is ignored"""


def idle(place: int) -> DecodeRow:
    """Returns a row for a slot with no token to feed. The slot must hold nothing from `place` on:
    the row writes there."""
    return DecodeRow(0, Prompt((0,)), place, idle=True)


class Call(NamedTuple):
    """The inputs of one call of the model; shapes as in GLM.forward, places [B, L] as in
    Cache.window."""

    tokens: Tensor
    positions: Tensor
    key_start: Tensor
    key_end: Tensor
    places: Tensor
    first: int
    """the slot of row 0; row b uses slot first + b"""
    adapters: tuple[str, ...]
    """each row's LoRA; empty: the model alone"""
    shared: bool = False
    """all rows use slot `first`"""


class Runner:
    """A model with a cache for `slots` sequences of at most `length` tokens; reads prompts in
    chunks of `chunk` tokens. Its caller keeps a backend active (`registry.use`)."""

    speculate = 0
    drafted = accepted = 0
    """tokens that were drafted, and those of them that the model chose too"""

    def __init__(
        self,
        model: GLM,
        slots: int,
        length: int | None = None,
        chunk: int = CHUNK,
        loras: LoRAs | None = None,
        speculate: int = 0,
    ) -> None:
        """loras: the adapters that prompts may name. speculate: the tokens that are drafted at a
        time (model/speculate.py); 0: none. Raises ConfigError for a model that cannot draft."""
        require_draft_layer(model.config, speculate)
        self.speculate = speculate
        weight, self._loras = model.embedding, loras
        self.model, self.config, self.slots = model, model.config, slots
        model.eval()  # adapters apply dropout in training only
        self.length = min(length or model.config.max_length, model.config.max_length)
        # with dynamic scaling all keys of a prompt are rotated by frequencies of its whole length
        self.chunk = self.length if model.config.rope_scaling == "dynamic" else chunk
        further = int(speculate > 0)
        self.cache = Cache(model.config, slots, self.length, weight.dtype, weight.device, further)
        self._last: Callable[[], Call]
        self.hidden: Tensor
        """hidden states [B, L, D] of the latest call, unless a backend took it whole"""
        self._step: DecodeStep | Support = unsupported("not asked for yet")
        self._step_made_for: object = None
        self._step_backend: object = None
        """the backend that `_step` was asked from; None: ask again"""

    def require_room(self, prompt: Prompt, offset: int = 0) -> None:
        """Raises PromptError for a prompt that is empty, too long, or has unknown ids."""
        if not prompt.tokens:
            raise PromptError("prompt: is empty; give at least one token")
        if len(prompt.tokens) + offset >= self.length:
            raise PromptError(
                f"prompt: {len(prompt.tokens) + offset} tokens leave no room for a reply in "
                f"a context of {self.length}; shorten it to {self.length - 1} at most"
            )
        vocab = self.config.vocab
        if strange := [t for t in prompt.tokens if not 0 <= t < vocab]:
            raise PromptError(
                f"prompt: token {strange[0]} is not in the model's vocabulary of {vocab}; use the "
                "tokenizer it was trained with"
            )

    def prefill(self, first: int, prompts: Sequence[Prompt]) -> Tensor:
        """Reads whole prompts, row b into slot `first` + b, and returns the logits [B, V] (float32)
        after each. Several prompts are padded on the left to one length, which changes the logits
        by rounding only."""
        length = max(len(p.tokens) for p in prompts)
        for prompt in prompts:
            self.require_room(prompt, length - len(prompt.tokens))
        start = 0
        while True:
            logits, start = self.read(first, prompts, start)
            if start == length:
                return logits

    def read(self, first: int, prompts: Sequence[Prompt], start: int) -> tuple[Tensor, int]:
        """Reads the next chunk of prompts that are in their slots up to place `start`. Returns the
        logits [B, V] after the chunk, and the place where it ends. Part A is never cut, however
        long: its tokens see the tokens after them."""
        self._step_backend = None  # the model may have changed between two prompts
        length = max(len(p.tokens) for p in prompts)
        causal = not any(p.sep for p in prompts)
        end_of_a = 0 if causal else max(length - len(p.tokens) + p.sep for p in prompts)
        end = min(max(start + self.chunk, end_of_a), length)
        rows = [_padded(prompt, length, start, end) for prompt in prompts]
        tokens, positions, begin, ends = (list(column) for column in zip(*rows, strict=True))
        places = [list(range(start, end))] * len(rows)
        adapters = tuple(prompt.adapter for prompt in prompts)
        call = _call(tokens, positions, begin, ends, places, first, adapters, self._device)
        return self._logits(call), end

    def decode(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Feeds row b's token to slot b and returns the logits [B, V] (float32) after it. The
        backend does it in one call if it can; otherwise op by op, and the session records why."""
        adapters = tuple(row.prompt.adapter for row in rows)
        fed, step = _rows(rows), self._whole_step(len(rows), any(adapters))
        if step is None:
            return self._logits(_step_call(fed, adapters, self._device))
        self._last = lambda: _step_call(fed, adapters, self._device)
        return step(fed, self.cache.memory)

    def verify(self, slot: int, rows: Sequence[DecodeRow]) -> Tensor:
        """Feeds successive tokens of one sequence to its slot in one call and returns the logits
        [B, V] (float32) after each. Each token is a row of its own, as in `decode`, so with kernels
        whose rows do not depend on one another the bits are those of one step after another."""
        adapters = tuple(row.prompt.adapter for row in rows)
        return self._logits(_step_call(_rows(rows), adapters, self._device, slot))

    def read_further(self, slot: int, rows: Sequence[DecodeRow], hidden: Tensor) -> Tensor:
        """Feeds tokens of one sequence to the first layer of multi-token prediction, with the
        hidden states [B, 1, D] of the tokens before them. Returns its hidden states [B, 1, D]."""
        return self._further(_step_call(_rows(rows), (), self._device, slot), hidden)

    def read_prompt_further(self, before: Tensor) -> Tensor:
        """Lets that layer read the prompt's chunk that was read just now. before [1, 1, D]: the
        hidden state of the token in front. Returns the chunk's last hidden state [1, 1, D]."""
        self._further(self.last, torch.cat((before, self.hidden[:, :-1]), 1))
        return self.hidden[:, -1:]

    def _whole_step(self, num_rows: int, adapted: bool) -> DecodeStep | None:
        session = dispatch.session()
        if self._step_backend is not session.backend:
            self._ask(session.backend)
        step = self._step
        if dispatch.intercepted():
            return None  # no fallback: somebody wants to see every op call
        if adapted:
            session.decoded_op_by_op("a row has a LoRA of its own")
            return None
        if session.exact and self.config.kv_latent:
            session.decoded_op_by_op("exact: keys and values are made of the latents again")
            return None
        if isinstance(step, Support):
            session.decoded_op_by_op(step.reason)
            return None
        if num_rows > step.max_rows:
            session.decoded_op_by_op(f"{num_rows} rows; one call takes {step.max_rows} at most")
            return None
        return step

    def _ask(self, backend: KernelProvider) -> None:
        """Asks for the backend's step, unless it was made for the model as it is: to make one may
        take as long as some tokens."""
        parts = stack(self.model, lambda: self._angles)
        made_for = None if isinstance(parts, Support) else (id(backend), parts.identity())
        if isinstance(parts, Support):
            self._step = parts
        elif made_for != self._step_made_for:
            self._step = backend.decode_step(parts)
        self._step_made_for, self._step_backend = made_for, backend

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor] | None:
        return angles(self.model, self.length)

    @property
    def last(self) -> Call:
        """The inputs of the latest call."""
        return self._last()

    def explain(self, call: Call, step: int) -> GenerationError:
        """Returns the error for logits that are not finite: repeats the call and names the first op
        whose results are not."""
        with torch.no_grad(), nonfinite.watch(self._model_of(call)) as watch:
            self._logits(call)
        return GenerationError(
            f"token {step}: the logits are not finite; first: {watch.op or 'op linear in the head'}"
            "; check the checkpoint, or use a wider dtype"
        )

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.device

    def _model_of(self, call: Call) -> GLM:
        return self._loras.model_of(call.adapters) if self._loras else self.model

    def _logits(self, call: Call) -> Tensor:
        self._last, model = lambda: call, self._model_of(call)
        window = self.cache.window(call.first, call.places, call.shared)
        with torch.inference_mode():
            self.hidden = hidden = model(
                call.tokens, call.positions, call.key_start, call.key_end, window
            )  # [B, L, D]
            logits = model.project(hidden[:, -1].contiguous())  # [B, V]
        # a copy: a tensor made in inference mode cannot be written to outside of it
        return logits.to(torch.float32, copy=True)

    @torch.inference_mode()
    def _further(self, call: Call, hidden: Tensor) -> Tensor:
        window = self.cache.window(call.first, call.places, call.shared)
        # the first token of a sequence has no hidden state before it, and no token sees it
        start = call.key_start + 1
        return self.model.further(
            0, call.tokens, hidden, call.positions, start, call.key_end, window
        )


def require_draft_layer(config: ModelConfig, speculate: int) -> None:
    """Raises ConfigError where so many tokens cannot be drafted."""
    if not 0 <= speculate <= MOST_DRAFTS:
        raise ConfigError(f"speculate={speculate}: must lie in 0 ... {MOST_DRAFTS}")
    if speculate and not config.num_mtp_layers:
        raise ConfigError(
            f"speculate={speculate}: the model has no layer of multi-token prediction "
            "(num_mtp_layers=0); use a checkpoint with one, or decode without"
        )


def _padded(
    prompt: Prompt, length: int, start: int, end: int
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Returns tokens, positions, key_start and key_end for places [start, end) of a prompt padded
    on the left to `length`. Pads see nothing, and no token sees them."""
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
    """Returns the rows in the form that a backend's decode step takes."""
    return Rows(
        [r.token for r in rows],
        [p for r in rows for p in r.prompt.position(r.place)],
        [r.offset for r in rows],
        [0 if r.idle else r.offset + r.prompt.key_end(r.place) for r in rows],
        [r.offset + r.place for r in rows],
    )


def _step_call(
    rows: Rows, adapters: tuple[str, ...], device: torch.device, slot: int | None = None
) -> Call:
    """Returns the same rows as inputs of the model, one token each. slot: of all rows."""
    pairs = zip(rows.positions[::2], rows.positions[1::2], strict=True)
    return _call(
        [[t] for t in rows.tokens],
        [[list(p)] for p in pairs],
        [[k] for k in rows.key_start],
        [[k] for k in rows.key_end],
        [[p] for p in rows.places],
        slot or 0,
        adapters,
        device,
        slot is not None,
    )


def _call(
    tokens: list[list[int]],
    positions: list[list[list[int]]],
    start: list[list[int]],
    end: list[list[int]],
    places: list[list[int]],
    first: int,
    adapters: tuple[str, ...],
    device: torch.device,
    shared: bool = False,
) -> Call:
    return Call(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device).transpose(1, 2),  # [B, 2, L]
        torch.tensor(start, dtype=torch.int32, device=device),
        torch.tensor(end, dtype=torch.int32, device=device),
        torch.tensor(places, device=device),
        first,
        adapters,
        shared,
    )
