"""The catalogue: every planted bug and benign change, and the three small models they are run
in."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.data.open import open_sampler
from glm_core.data.sampler import Batch
from glm_core.faults.benign import BENIGN, Benign
from glm_core.faults.bugs import BUGS
from glm_core.faults.variants import Bug

Variant = Bug | Benign
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
# and SiLU would stay in their linear range, where half the bugs do nothing

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
}
"""three small models that have every op between them, with their sequence lengths L"""

_SETUP_OF = {
    "rms_norm": "glm4",
    "add_rms_norm": "glm4",
    "swiglu": "glm4",
    "gelu": "glm",
    "linear": "glm",
    "linear_cross_entropy": "glm4",
    "global_norm": "glm4",
    "adamw": "glm4",
}


def setup_of(variant: Variant) -> str:
    """The small model a variant is planted in."""
    return variant.setup or _SETUP_OF.get(variant.op, "130b")


def held_out(name: str) -> bool:
    """A third of the catalogue, chosen by a hash of the name: these are not consulted when a rule
    of the verdict is adjusted, so that their detection rate is no memory of the adjustment."""
    return hashlib.sha256(name.encode()).digest()[0] % 3 == 0


def config(setup: str, dtype: str, steps: int) -> RunConfig:
    """The run of one setup: 8 sequences of real text a step."""
    model, length = SETUPS[setup]
    return RunConfig(
        model=model,
        data=DataConfig(vocab=model.vocab, length=length, gmask_prob=0.5),
        train=TrainConfig(
            backend="reference",
            dtype=dtype,  # type: ignore[arg-type]  # TrainConfig checks it
            steps=steps,
            warmup_steps=5,
            clip=0.5,
        ),
    )


def variants(dtype: str) -> list[Variant]:
    """All bugs that are one in this dtype, then all changes that change something in it."""
    both: list[Variant] = [*BUGS, *BENIGN]
    return [v for v in both if dtype in v.dtypes]


class Drawn:
    """A sampler over sequences drawn beforehand: opening the data again for each of the hundreds of
    runs would cost more than the runs."""

    def __init__(self, rows: Batch) -> None:
        self.rows, self.index = rows, 0

    def next(self, micro_batch: int) -> Batch:
        """The next sequences."""
        at = slice(self.index, self.index + micro_batch)
        self.index += micro_batch
        return Batch(**{f.name: getattr(self.rows, f.name)[at] for f in dataclasses.fields(Batch)})

    def state(self) -> dict[str, Any]:
        """Where it stands."""
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes there."""
        self.index = state["index"]


def draw(run: RunConfig, cache_dir: str | Path) -> Batch:
    """All sequences of a run."""
    source = open_sampler(run.data, run.train.seed, cache_dir, positions=run.model.positions)
    return source.next(run.train.steps * run.train.global_batch)
