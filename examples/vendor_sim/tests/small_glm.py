"""A small model, its data and its config. The device is not started here."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.model.presets import preset

STEPS, L, V = 4, 24, 256
MODEL = {"num_layers": 2, "hidden": 64, "num_heads": 4, "ffn": 96, "vocab": V, "max_length": L}


@dataclasses.dataclass
class Batch:
    """Returns random tokens [B, L], each of which predicts the next."""

    tokens: torch.Tensor

    def __post_init__(self) -> None:
        b = len(self.tokens)
        self.labels = self.tokens.roll(-1, 1)
        self.loss_weight = torch.ones(b, L)
        self.positions = torch.arange(L).expand(b, 2, L)
        self.key_start = torch.zeros(b, L, dtype=torch.int32)
        self.key_end = torch.arange(1, L + 1, dtype=torch.int32).expand(b, L)


class Sampler:
    """Yields the same batches in every run; its state is how many it has yielded."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, micro_batch: int) -> Batch:
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        return Batch(torch.randint(0, V, (micro_batch, L), generator=generator))

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def config(backend: str = "sim", dtype: str = "float32") -> RunConfig:
    train = TrainConfig(
        backend=backend, dtype=dtype, steps=STEPS, micro_batch=2, global_batch=4, warmup_steps=1
    )  # type: ignore[arg-type]  # checked when it is set
    return RunConfig(model=preset("tiny", **MODEL), data=DataConfig(length=L, vocab=V), train=train)
