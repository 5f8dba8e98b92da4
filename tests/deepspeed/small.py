"""What the scripts train: a model of a few hundred weights, and other data on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def batches(count: int, rows: int = 4, rank: int | None = None) -> list[dict[str, Tensor]]:
    """Different on every rank (None: this one)."""
    generator = torch.Generator().manual_seed(100 + (dist.get_rank() if rank is None else rank))
    xs = [torch.randn(rows, 7, generator=generator) for _ in range(count)]
    return [{"x": x, "labels": (x.sum(1).abs() * 3).long() % 5} for x in xs]


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples of every rank, for a distributed sampler."""

    def __init__(self) -> None:
        self.x = torch.randn(96, 7, generator=torch.Generator().manual_seed(50))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = self.x[index]
        return {"x": x, "labels": (x.sum().abs() * 3).long() % 5}
