"""One sequence that is generated: its prompt and settings, and the tokens so far."""

from __future__ import annotations

import torch

from glm_core.errors import GenerationError
from glm_core.model.prompt import Prompt
from glm_core.model.runner import DecodeRow
from glm_core.model.sample import Sampling, TokenLogprob


class Generation:
    """One sequence: its prompt, settings, slot, and the tokens so far."""

    def __init__(self, prompt: Prompt, sampling: Sampling, slot: int, offset: int) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.slot, self.offset = slot, offset
        self.read = 0
        """tokens of the prompt that are in the cache"""
        self.reused: int | None = None
        """those of them that an earlier prompt has left there; None before the first is read"""
        self.tokens: list[int] = []
        """tokens generated so far, without the stop token"""
        self.logprobs: list[TokenLogprob] = []
        """one for each token, and for the stop token, where the sampling asks for them"""
        self.finish = ""
        """why the sequence ended: `stop` (a stop token came), `length` (max_tokens or the context
        is used up), `error` or `cancelled`; empty while it runs"""
        self.error: GenerationError | None = None
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._ahead: list[float] = []
        """numbers of the generator that no token has used yet"""

    @property
    def reading(self) -> bool:
        """Returns whether a part of the prompt is still to be read."""
        return self.read < len(self.prompt.tokens)

    def draw(self) -> float:
        """Returns the next uniform number of this sequence's own generator."""
        [number] = self.draws(1)
        del self._ahead[0]
        return number

    def draws(self, count: int) -> list[float]:
        """Returns the numbers that the next `draw` calls will return."""
        missing = count - len(self._ahead)
        if missing > 0:
            self._ahead += [self._number() for _ in range(missing)]
        return self._ahead[:count]

    def _number(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def take(self, token: int, room: int) -> None:
        """Adds a token, or ends the sequence. room: new tokens that fit into the context."""
        if token in self.sampling.stop:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) >= min(self.sampling.max_tokens, room):
            self.finish = "length"

    def next(self) -> DecodeRow:
        """Returns the row to feed in the next decode step, once the prompt is read."""
        return self.latest(1)[0]

    def latest(self, count: int) -> list[DecodeRow]:
        """Returns the rows of the latest `count` tokens, of prompt and reply together."""
        read, size = self.prompt.tokens, len(self.prompt.tokens)
        end = size + len(self.tokens)
        return [
            DecodeRow(read[i] if i < size else self.tokens[i - size], self.prompt, i, self.offset)
            for i in range(end - count, end)
        ]
