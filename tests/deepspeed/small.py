"""The model of a few hundred weights that the scripts train, and data that differ on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

otherwise = False
"""the rows of each micro-batch in the other order: the same numbers, rounded otherwise"""


class Block(nn.Module):
    """A residual layer with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Classifier(nn.Module):
    """[B, 7] -> loss over 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, labels = (t.flip(0) if otherwise else t for t in (x, labels))
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def batches(count: int, rows: int = 4, rank: int | None = None) -> list[dict[str, Tensor]]:
    """Returns batches that are different on every rank (None: this one)."""
    generator = torch.Generator().manual_seed(100 + (dist.get_rank() if rank is None else rank))
    xs = [torch.randn(rows, 7, generator=generator) for _ in range(count)]
    return [{"x": x, "labels": (x.sum(1).abs() * 3).long() % 5} for x in xs]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The samples of every rank, for a distributed sampler."""

    def __init__(self) -> None:
        self.x = torch.randn(96, 7, generator=torch.Generator().manual_seed(50))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = self.x[index]
        return {"x": x, "labels": (x.sum().abs() * 3).long() % 5}


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pairs of input and label, as a pipeline's loss function takes them."""

    def __init__(self) -> None:
        self.x = torch.randn(96, 7, generator=torch.Generator().manual_seed(51))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return x, (x.sum().abs() * 3).long() % 5


VOCABULARY, LENGTH = 19, 6


def sentences(replica: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yields ((tokens, mask), labels) of a data-parallel replica without end. Every third token
    follows from the one before."""
    generator = torch.Generator().manual_seed(300 + replica)
    while True:
        tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=generator)
        tokens[:, 1::3] = (tokens[:, 0:-1:3] * 5 + 1) % VOCABULARY
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        yield (tokens[:, :-1], mask.expand(3, LENGTH, LENGTH)), tokens[:, 1:]


class Embedding(nn.Module):
    """Embeds tokens and their positions;  [B, L] -> [B, L, D]. The mask is passed on."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(VOCABULARY, hidden), nn.Embedding(LENGTH, hidden)
        nn.init.normal_(self.word.weight, std=0.3)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = inputs
        return self.word(tokens) + self.position(torch.arange(LENGTH)), mask


class Attention(nn.Module):
    """A causal layer of one head;  [B, L, D] -> [B, L, D]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        # a key's bias has no gradient but roundings, of which Adam makes whole steps
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = inputs
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e4)
        return x + self.out(torch.tanh(scores.softmax(-1) @ v)), mask


def logits(embedding: Embedding, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Uses the embedding's transpose as the head;  [B, L, D] -> [B, L, V]."""
    return inputs[0] @ embedding.word.weight.T


def next_token_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1).float(), labels.flatten())


def made_state() -> dict[str, dict[str, Tensor]]:
    """Returns random masters and moments of a Classifier."""
    generator = torch.Generator().manual_seed(71)
    state = {}
    for name, p in Classifier().named_parameters():
        draws = [torch.randn(p.shape, generator=generator) * 0.1 for _ in range(3)]
        state[name] = {"fp32": draws[0], "exp_avg": draws[1], "exp_avg_sq": draws[2].square()}
    return state
