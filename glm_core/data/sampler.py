"""Yields the batches of a run: a pure function of seed and sequence number, sliced for data
parallelism, and resumable."""

from __future__ import annotations

import dataclasses
import hashlib
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_core.config import DataConfig
from glm_core.data.infill import Infill
from glm_core.data.packing import Epoch, Packer
from glm_core.errors import DataError

if TYPE_CHECKING:
    from glm_core.data.tokenizer import Tokenizer  # a batch needs no sentencepiece


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of L tokens. Key j is visible to query i if and only if key_start[b, i] <= j <
    key_end[b, i]."""

    tokens: Tensor
    """int64 [B, L], the inputs; <pad> after the last sample"""
    labels: Tensor
    """int64 [B, L], what each input predicts (no shift); <pad> where there is no loss"""
    loss_weight: Tensor
    """float32 [B, L]: 1 on the targets, 0 on the visible text and padding"""
    positions: Tensor
    """int64 [B, 2, L]: row 0 is the place in the text, row 1 the place in the span; they begin at 0
    in every sample"""
    key_start: Tensor
    """int32 [B, L]: the first token of the query's sample"""
    key_end: Tensor
    """int32 [B, L]: one after the query, or the end of the sample's part A if that is later;
    padding sees itself"""

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


class Sampler:
    """Runs through the corpus endlessly, epoch by epoch, each with its own shuffle and its own
    blanks.

    Sequences have global numbers 0, 1, ...; sequence n is the same for every micro-batch and world
    size. One call of `next(b)` on every rank takes world * b of them, and rank r gets the r-th
    b."""

    def __init__(
        self,
        tokens: NDArray[np.int32],
        config: DataConfig,
        tokenizer: Tokenizer,
        corpus: dict[str, Any],
        seed: int,
        rank: int = 0,
        world: int = 1,
        gmask_continues: bool = True,
    ) -> None:
        """tokens: the ids of all documents, <eod> after each. corpus: facts about the text for
        traces; its `sha256` identifies it."""
        assert 0 <= rank < world
        self.config, self.tokenizer, self.corpus, self.seed = config, tokenizer, corpus, seed
        self.rank, self.world = rank, world
        self.index = 0
        """global number of the next sequence"""
        self.order_hash = hashlib.sha256().hexdigest()
        """sha256 over the inputs of all sequences that this rank has yielded, in order:
        hash(previous hash + sequence)"""
        self._tokens = tokens
        self._ends = np.flatnonzero(tokens == tokenizer.eod)
        self._starts = np.append(0, self._ends[:-1] + 1)
        self._infill = Infill(config, tokenizer, gmask_continues)
        self._packer = Packer((self._ends - self._starts).tolist(), config, self._infill, seed)
        self._current: Epoch = self._packer.epoch(0)
        self._planned = [len(self._current)]
        """global number after the last sequence of every epoch planned so far"""
        self._epoch = 0

    def next(self, micro_batch: int) -> Batch:
        """Returns this rank's next `micro_batch` sequences, on the CPU."""
        first = self.index + self.rank * micro_batch
        batch = BatchArrays(micro_batch, self.config.length, self.tokenizer.pad)
        for row in range(micro_batch):
            self.fill(batch, row, first + row)
            link = bytes.fromhex(self.order_hash) + batch.tokens[row].tobytes()
            self.order_hash = hashlib.sha256(link).hexdigest()
        self.index += self.world * micro_batch
        return batch.freeze()

    def skip(self, sequences: int) -> None:
        """Skips so many global sequences; `order_hash` records it."""
        self.index += sequences
        link = bytes.fromhex(self.order_hash) + f"skip {sequences}".encode()
        self.order_hash = hashlib.sha256(link).hexdigest()

    def fill(self, batch: BatchArrays, row: int, index: int) -> None:
        """Builds global sequence `index` in a row of the batch."""
        epoch, number = self.locate(index)
        rng = Random(f"{self.seed} {epoch} {number}")
        kind, segments = self._current.sequence(number)
        at = 0
        for document, start, end in segments.tolist():
            begin, stop = self._starts[document] + (start, end)
            text = self._tokens[begin:stop].astype(np.int64)
            sample = self._infill.sample(kind, text, bool(stop == self._ends[document]), rng)
            n = len(sample.tokens)
            span = slice(at, at + n)
            batch.tokens[row, span] = sample.tokens
            batch.labels[row, span] = sample.labels
            batch.positions[row, :, span] = sample.positions
            batch.loss_weight[row, at + sample.sep : at + n] = 1
            batch.key_start[row, span] = at
            batch.key_end[row, span] = np.maximum(batch.key_end[row, span], at + sample.sep)
            at += n

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the epoch of a global sequence and its number there; plans epochs on the way."""
        while index >= self._planned[-1]:
            self._epoch = len(self._planned)
            self._current = self._packer.epoch(self._epoch)
            self._planned.append(self._planned[-1] + len(self._current))
        epoch = int(np.searchsorted(self._planned, index, side="right"))
        if epoch != self._epoch:
            self._epoch, self._current = epoch, self._packer.epoch(epoch)
        return epoch, index - (self._planned[epoch - 1] if epoch else 0)

    def state(self) -> dict[str, Any]:
        """Returns a JSON-able state, with which `restore` makes a sampler over the same data
        continue exactly here."""
        return {"index": self.index, "order_hash": self.order_hash, "of": self.identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises DataError if it is malformed, or belongs to other
        data, settings or another seed."""
        match state:
            case {"index": int(index), "order_hash": str(order_hash), "of": dict(saved)} if (
                index >= 0
            ):
                mine = self.identity()
            case _:
                raise DataError("sampler state: malformed; restore a whole checkpoint")
        if other := [key for key in mine if mine[key] != saved.get(key)]:
            differences = ", ".join(
                f"{key}={saved.get(key)!r} (here {mine[key]!r})" for key in other
            )
            raise DataError(
                f"sampler state: saved with {differences}; resume with the same data and seed"
            )
        self.index, self.order_hash = index, order_hash

    def identity(self) -> dict[str, Any]:
        """Returns everything that the sequence of batches depends on: the text itself, but not its
        path."""
        settings = dataclasses.asdict(self.config) | {"seed": self.seed}
        del settings["path"], settings["text_key"]
        rows = {"gmask_continues": self._infill.gmask_continues}
        return (
            settings | rows | {"corpus": self.corpus["sha256"], "tokenizer": self.tokenizer.sha256}
        )


class BatchArrays:
    """A batch being filled. Empty rows are padding, in which each token sees itself alone."""

    def __init__(self, size: int, length: int, pad: int) -> None:
        shape = (size, length)
        here = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
        self.tokens = np.full(shape, pad, np.int64)
        self.labels = np.full(shape, pad, np.int64)
        self.loss_weight = np.zeros(shape, np.float32)
        self.positions = np.zeros((size, 2, length), np.int64)
        self.key_start = here.copy()
        self.key_end = here + np.int32(1)

    def freeze(self) -> Batch:
        """Returns the batch as tensors that share this memory."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(Batch)}
        return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
