"""Questions with their answers as batches, for fine-tuning: one pair a row, the loss on the answer
alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glm_core.data.sampler import Arrays, Batch
from glm_core.errors import DataError
from glm_core.model.prompt import Prompt


class Pair(NamedTuple):
    """Tokens of a question as the model is asked it, and of the answer with what ends it."""

    prompt: Prompt
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        """Inputs it takes: the last token of the answer is only predicted."""
        return len(self.prompt.tokens) + len(self.answer) - 1


class Pairs:
    """An endless run through the pairs, epoch by epoch, each in its own order. Sequence n is the
    same whatever the micro-batch. Raises DataError for a pair that is longer than a row."""

    def __init__(self, pairs: Sequence[Pair], length: int, seed: int) -> None:
        self.pairs, self.length, self.seed = pairs, length, seed
        self.index = 0
        """number of the next sequence"""
        if not pairs:
            raise DataError("pairs: there are none; give at least one question with its answer")
        if long := [i for i, pair in enumerate(pairs) if pair.length > length]:
            raise DataError(
                f"pairs: number {long[0] + 1} and {len(long) - 1} more are longer than a row of "
                f"{length} tokens (up to {max(p.length for p in pairs)}); raise data.length, or "
                "shorten them"
            )
        self._sha256 = hashlib.sha256(repr(pairs).encode()).hexdigest()

    def next(self, micro_batch: int) -> Batch:
        """The next rows, on the CPU."""
        batch = Arrays(micro_batch, self.length, pad=0)
        for row in range(micro_batch):
            epoch, number = divmod(self.index + row, len(self.pairs))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
            self._fill(batch, row, self.pairs[order[number]])
        self.index += micro_batch
        return batch.freeze()

    def _fill(self, batch: Arrays, row: int, pair: Pair) -> None:
        prompt, n, asked = pair.prompt, pair.length, len(pair.prompt.tokens)
        batch.tokens[row, :n] = (*prompt.tokens, *pair.answer[:-1])
        batch.labels[row, asked - 1 : n] = pair.answer
        batch.loss_weight[row, asked - 1 : n] = 1
        batch.positions[row, :, :n] = np.transpose([prompt.position(i) for i in range(n)])
        batch.key_start[row, :n] = 0
        batch.key_end[row, :n] = [prompt.key_end(i) for i in range(n)]

    def state(self) -> dict[str, Any]:
        """JSON-able; `restore` goes on exactly here."""
        return {"index": self.index, "of": self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state belongs to other pairs, another length or seed."""
        if state.get("of") != self._identity() or type(state.get("index")) is not int:
            raise DataError(
                "sampler state: saved with other pairs, another data.length or seed; resume with "
                "the same"
            )
        self.index = state["index"]

    def _identity(self) -> dict[str, Any]:
        return {"pairs": self._sha256, "length": self.length, "seed": self.seed}
