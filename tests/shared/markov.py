"""A text that can be learned in a few steps, a model small enough to be calibrated in seconds, and
backends that differ from the reference in one kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from glm_core import align, ops
from glm_core.backends.base import Backend
from glm_core.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig
from glm_core.data.sampler import Batch
from glm_core.sensitivity.plans.sample import batch_of
from glm_core.session import Kernel

VOCAB, LENGTH = 64, 32


class Markov:
    """Four of five tokens follow from the one before; a random prefix is seen as a whole."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def next(self, micro_batch: int) -> Batch:
        """Sequences one by one, so that their order knows no micro-batch."""
        batch = batch_of([self.sequence() for _ in range(micro_batch)])
        place = batch.positions[:, 0]
        return dataclasses.replace(
            batch, positions=torch.stack((place, torch.zeros_like(place)), 1)
        )

    def sequence(self) -> tuple[torch.Tensor, int]:
        """LENGTH + 1 tokens and the length of the prefix."""
        draw = functools.partial(torch.randint, generator=self.generator)
        tokens = draw(0, VOCAB, (LENGTH + 1,)).tolist()
        follows = (draw(0, 5, (LENGTH + 1,)) > 0).tolist()
        for i in range(LENGTH):
            if follows[i]:
                tokens[i + 1] = (5 * tokens[i] + 7) % (VOCAB // 4)
        return torch.tensor(tokens), int(draw(4, LENGTH - 4, ()))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore: every run starts at the first sequence."""


def config(dtype: Dtype, steps: int = 12, micro_batch: int = 4) -> RunConfig:
    """A GLM-130B style model of two layers."""
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden=32,
            num_heads=2,
            ffn=64,
            vocab=VOCAB,
            qk_layer_scaling=True,
            embedding_gradient_shrink=0.1,
        ),
        data=DataConfig(vocab=VOCAB, length=LENGTH),
        train=TrainConfig(
            backend="reference",
            dtype=dtype,
            steps=steps,
            micro_batch=micro_batch,
            global_batch=4,
            lr=3e-3,
            warmup_steps=3,
        ),
    )


@functools.cache
def calibration(dtype: Dtype) -> align.Calibration:
    """Computed once per test process; in one thread, since the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return align.calibrate(config(dtype), sampler=Markov, controls=6, capture_steps=(3, 12))
    finally:
        torch.set_num_threads(threads)


def backend(**kernels: Callable[..., Any]) -> Backend:
    """References, these ops excepted."""
    made = Backend(name="candidate", device_type="cpu", verified="in this test")
    for name, op in ops.all_ops().items():
        made.kernels[name] = Kernel(kernels.get(name, op.reference), None)
    return made
