"""Makes tiny models of several GLMs and a text they can learn, the same in every process."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from glm_core.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig
from glm_core.data.sampler import Batch

VOCAB, LENGTH, ROWS, STEPS = 64, 16, 8, 4
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden": 32,
    "num_heads": 4,
    "vocab": VOCAB,
    "init_std": 0.1,
}
SPARSE: dict[str, Any] = {
    "num_kv_heads": 2,
    "norm": "rms",
    "placement": "pre",
    "activation": "swiglu",
    "rope_fraction": 0.5,
    "linear_bias": False,
    "tied_head": False,
    "qk_norm": True,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "expert_scale": 1.8,
    "balance_weight": 0.01,
}
"""a model with experts in the style of GLM-4.5"""
MODELS = {
    "130b": ModelConfig(**SIZES, ffn=64, qk_layer_scaling=True, embedding_gradient_shrink=0.1),
    "glm4": ModelConfig(
        **SIZES,
        ffn=48,
        num_kv_heads=2,
        norm="rms",
        placement="sandwich",
        activation="swiglu",
        rope_fraction=0.5,
        rope_interleaved=True,
        linear_bias=False,
        tied_head=False,
    ),
    "10b": ModelConfig(
        **SIZES | {"num_layers": 2},
        ffn=64,
        placement="pre",
        activation="gelu",
        positions="learned_2d",
        max_length=32,
    ),
    "moe": ModelConfig(**SIZES, **SPARSE, ffn=48, experts_per_token=2, expert_ffn=24),
}
MODELS["mtp"] = dataclasses.replace(MODELS["moe"], num_layers=2, num_mtp_layers=1)
MODELS["mtp2"] = dataclasses.replace(MODELS["10b"], num_mtp_layers=2)
"""with everything that both ends of a pipeline can hold: a tied embedding and position tables"""


class Text:
    """A text in which four of five tokens follow from the one before. Rows differ in prefix and so
    in weight: a mean over ranks is not the mean over tokens."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def next(self, micro_batch: int) -> Batch:
        """Draws row by row, so that the order knows no micro-batch."""
        return batch_of([self._row() for _ in range(micro_batch)])

    def _row(self) -> tuple[torch.Tensor, int]:
        draws = torch.randint(0, 1 << 20, (LENGTH + 2,), generator=self.generator).tolist()
        tokens = [d % VOCAB for d in draws[: LENGTH + 1]]
        for i in range(LENGTH):
            if draws[i] % 5:
                tokens[i + 1] = (5 * tokens[i] + 7) % (VOCAB // 2)
        return torch.tensor(tokens), 2 + draws[-1] % (LENGTH - 3)

    def state(self) -> dict[str, Any]:
        """Returns nothing: every run starts at the first row."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Does nothing: every run starts at the first row."""


def batch_of(rows: list[tuple[torch.Tensor, int]]) -> Batch:
    """Returns a batch of rows: L + 1 tokens each, and the length of a prefix that is seen as a
    whole and not learned."""
    tokens, sep = torch.stack([t for t, _ in rows]), torch.tensor([[s] for _, s in rows])
    place = torch.arange(tokens.shape[1] - 1).expand(len(rows), -1)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_weight=(place >= sep).float(),
        positions=torch.stack((place, (place - sep + 1).clamp(min=0)), 1),
        key_start=torch.zeros_like(place, dtype=torch.int32),
        key_end=torch.maximum(place + 1, sep).int(),
    )


def config(model: str, dtype: Dtype = "float32") -> RunConfig:
    """Returns a run in which clipping is at work in every step, so that a wrong norm shows in the
    weights. Adam's epsilon is large enough that rounding does not choose the sign of an update."""
    return RunConfig(
        model=MODELS[model],
        data=DataConfig(vocab=VOCAB, length=LENGTH),
        train=TrainConfig(
            dtype=dtype,
            steps=STEPS,
            micro_batch=ROWS // 2,
            global_batch=ROWS,
            lr=3e-3,
            min_lr=3e-4,
            warmup_steps=2,
            clip=0.25,
            eps=1e-4,
        ),
    )
