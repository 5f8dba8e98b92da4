"""Chooses the four small models in which faults are planted and benign changes run, and says
which of them each one gets."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.data.open import open_sampler
from glm_core.data.sampler import Batch
from glm_core.faults.catalogue import BENIGN, PLANTED
from glm_core.faults.fault import Benign, Fault
from glm_core.sensitivity.plans.sample import SPARSE

Variant = Fault | Benign
DTYPES = ("float32", "bfloat16")

_SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden": 64,
    "num_heads": 4,
    "vocab": 512,
    "max_length": 64,
    "init_std": 0.1,
}
# init_std is near hidden^-1/2, as in the published models: with 0.02 at this width softmax, GELU
# and SiLU would stay in their linear range, where half the faults do nothing

SETUPS: dict[str, tuple[ModelConfig, int]] = {
    "130b": (
        ModelConfig(**_SMALL, ffn=128, qk_layer_scaling=True, embedding_gradient_shrink=0.1),
        64,
    ),
    "glm4": (
        ModelConfig(
            **_SMALL,
            ffn=128,
            norm="rms",
            placement="sandwich",
            activation="swiglu",
            num_kv_heads=2,
            rope_fraction=0.5,
            rope_interleaved=True,
            linear_bias=False,
            tied_head=False,
        ),
        60,
    ),
    "glm": (
        ModelConfig(
            **_SMALL,
            ffn=256,
            placement="pre",
            activation="gelu",
            positions="learned_2d",
            pb_relax=32.0,
        ),
        64,
    ),
    "moe": (
        ModelConfig(
            **_SMALL,
            **SPARSE,
            ffn=128,
            experts_per_token=3,
            expert_ffn=32,
            expert_groups=4,
            top_groups=2,
        ),
        64,
    ),
}
"""four small models that together call every op, with their sequence lengths L"""

_SETUP_OF = {
    "rms_norm": "glm4",
    "add_rms_norm": "glm4",
    "swiglu": "glm4",
    "gelu": "glm",
    "linear": "glm",
    "linear_cross_entropy": "glm4",
    "global_norm": "glm4",
    "adamw": "glm4",
    "route": "moe",
    "permute": "moe",
    "grouped_linear": "moe",
    "unpermute": "moe",
}


def setup_of(variant: Variant) -> str:
    """Returns the name of the small model in which a variant runs."""
    return variant.setup or _SETUP_OF.get(variant.op, "130b")


def held_out(name: str) -> bool:
    """Says whether a variant belongs to the third, chosen by a hash of the name, that is left out
    when a rule of the verdict is adjusted. Their detection rate shows that the rule was not fitted
    to them."""
    return hashlib.sha256(name.encode()).digest()[0] % 3 == 0


def config(setup: str, dtype: str, steps: int) -> RunConfig:
    """Returns the run of one setup, with 8 sequences of real text a step."""
    model, length = SETUPS[setup]
    return RunConfig(
        model=model,
        data=DataConfig(vocab=model.vocab, length=length, gmask_prob=0.5),
        train=TrainConfig(
            backend="reference",
            dtype=dtype,  # type: ignore[arg-type]  # TrainConfig checks it
            steps=steps,
            micro_batch=8,  # one a step: adamw writes 16-bit copies only where nothing accumulates
            warmup_steps=5,
            clip=0.5,
        ),
    )


def variants(dtype: str) -> list[Variant]:
    """Returns the planted faults that count in this dtype, then the benign changes that change
    something in it."""
    both: list[Variant] = [*PLANTED, *BENIGN]
    return [v for v in both if dtype in v.dtypes]


class Drawn:
    """A sampler over sequences drawn beforehand. Opening the data for each of the hundreds of runs
    would cost more than the runs."""

    def __init__(self, rows: Batch) -> None:
        self.rows, self.index = rows, 0

    def next(self, micro_batch: int) -> Batch:
        """Returns the next sequences."""
        at = slice(self.index, self.index + micro_batch)
        self.index += micro_batch
        return Batch(**{f.name: getattr(self.rows, f.name)[at] for f in dataclasses.fields(Batch)})

    def state(self) -> dict[str, Any]:
        """Returns the position, for `restore`."""
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a position that `state` returned."""
        self.index = state["index"]


def draw(run: RunConfig, cache_dir: str | Path) -> Batch:
    """Returns all sequences of a run."""
    source = open_sampler(run.data, run.train.seed, cache_dir, positions=run.model.positions)
    return source.next(run.train.steps * run.train.global_batch)
