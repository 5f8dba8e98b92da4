"""Drafts tokens with the layer of multi-token prediction, so that one call of the model can check
several (speculative decoding; Leviathan et al. 2023, DeepSeek-AI 2024, section 5.4.3).

A token is always chosen from the model's own logits, with the same random number as without
drafts. A draft is kept if it is the token so chosen. So the tokens are those of plain decoding,
greedy and sampled; drafts decide only how many come from one call. What a rejected draft left in
the cache is hidden by the mask, and overwritten by the next call.

The layer needs the hidden state before each token it reads. Where nobody kept that (a prompt's
beginning that an earlier prompt left, steps of several sequences at once) it reads zeros there, and
its drafts are worse.

Shapes: R tokens that the layer has not read, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.model.generation import Generation
from glm_core.model.runner import Runner
from glm_core.model.sample import choose


class Drafter:
    """Drafts for the sequences of a runner."""

    def __init__(self, runner: Runner, num_ids: int) -> None:
        self._runner, self._num_ids = runner, num_ids
        self._unread: dict[int, Tensor] = {}
        """by slot: the hidden states [R, 1, D] before the latest tokens"""

    def forget(self, slot: int) -> None:
        """Drops what is known of a slot's sequence: another one follows, or tokens came without
        this drafter."""
        self._unread.pop(slot, None)

    def read_prompt(self, slot: int) -> None:
        """Reads the chunk of a prompt that the runner has just read."""
        before = self._unread.get(slot)
        before = self._nothing if before is None else before
        self._unread[slot] = self._runner.read_prompt_further(before)

    def propose(self, g: Generation, count: int) -> list[int]:
        """Returns `count` tokens that may follow, each drafted with the random number that its
        place will be chosen with."""
        if not count:
            return []
        unread = self._unread.pop(g.slot, self._nothing)
        rows, drafts = g.latest(len(unread)), list[int]()
        for draw in g.draws(count):
            unread = self._runner.read_further(g.slot, rows, unread)[-1:]
            with torch.inference_mode():
                logits = self._runner.model.project(unread[:, -1])[:, : self._num_ids]
            drafts += choose(logits.float(), [g.sampling], [draw])
            last = rows[-1]
            rows = [last._replace(token=drafts[-1], place=last.place + 1)]
        return drafts

    def keep(self, slot: int, num_tokens: int) -> None:
        """Keeps the hidden states before the tokens that the runner's latest call has given."""
        self._unread[slot] = self._runner.hidden[:num_tokens]

    @property
    def _nothing(self) -> Tensor:
        like = self._runner.model.embedding
        return like.new_zeros(1, 1, self._runner.config.hidden)
