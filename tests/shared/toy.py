"""A run of a fraction of a second, and, as a script, the processes that die in the middle of it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.data.sampler import Batch
from glm_core.model.glm import GLM
from glm_core.training import checkpoint
from glm_core.training.run import run

V, L = 64, 16
SPARSE: dict[str, Any] = {
    "norm": "rms",
    "placement": "pre",
    "activation": "swiglu",
    "linear_bias": False,
    "tied_head": False,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_ffn": 8,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "num_mtp_layers": 1,
    "expert_groups": 2,
    "init_std": 0.2,
}
"""changes the toy's model into one with two sparse layers, one for multi-token prediction"""


class Sampler:
    """Batch n is a function of n. The number of targets differs from row to row, so that a mean of
    means is not the mean."""

    def __init__(self) -> None:
        self.index = 0

    def next(self, micro_batch: int) -> Batch:
        rows = [self._row(self.index + i) for i in range(micro_batch)]
        self.index += micro_batch
        tokens, sep = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])[:, None]
        place = torch.arange(L).expand(micro_batch, L)
        return Batch(
            tokens=tokens,
            labels=(tokens * 5 + 3) % V,
            loss_weight=(place >= sep).float(),
            positions=torch.stack((place, (place - sep + 1).clamp(min=0)), 1),
            key_start=torch.zeros(micro_batch, L, dtype=torch.int32),
            key_end=torch.maximum(place + 1, sep).int(),
        )

    def _row(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(V, (L,), generator=generator), 1 + (index * 7) % (L - 1)

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def config(model: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Two DeepNorm layers of width 16 on the reference backend, with a batch that grows."""
    sizes: dict[str, Any] = {"num_layers": 2, "hidden": 16, "num_heads": 2, "ffn": 24}
    training: dict[str, Any] = {
        "backend": "reference",
        "steps": 12,
        "save_every": 3,
        "warmup_steps": 3,
        "micro_batch": 2,
        "global_batch": 6,
        "ramp_from": 2,
        "ramp_increment": 2,
        "ramp_samples": 16,
    }
    return RunConfig(
        model=ModelConfig(**{**sizes, "vocab": V, "max_length": L, **(model or {})}),
        data=DataConfig(vocab=V, length=L),
        train=TrainConfig(**{**training, **changes}),
    )


class OneWord(Sampler):
    """The toy's batches, in which 7 is always the answer: what a frozen head can be taught."""

    def next(self, micro_batch: int) -> Batch:
        batch = super().next(micro_batch)
        return dataclasses.replace(batch, labels=torch.full_like(batch.labels, 7))


def base(seed: int = 1) -> GLM:
    return GLM(config({"init_std": 0.2}).model).init_weights(seed)


def dying_at(event: int, only_in_save: bool) -> Callable[[FrameType, str, Any], None]:
    """A profile function that SIGKILLs its process at the given event: a call or return, of Python
    or C, anywhere or only within `checkpoint.save`. `seen` counts them."""
    seen, inside = [0], [not only_in_save]

    def count(frame: FrameType, kind: str, argument: Any) -> None:
        if only_in_save and frame.f_code is checkpoint.save.__code__:
            inside[0] = kind != "return"
        seen[0] += inside[0]
        if inside[0] and seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    count.seen = seen  # type: ignore[attr-defined]  # a function carries its count
    return count


def child(folder: str, changes: dict[str, Any], event: int, in_save: bool, max_bytes: int) -> int:
    """One process of a run that is resumed as often as it takes; returns the number of events."""
    torch.set_num_threads(1)
    if max_bytes:  # the kernel kills at this byte, in the middle of the write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    resume = (Path(folder) / "config.toml").exists()
    count = dying_at(event, in_save)
    sys.setprofile(count)
    run(config(**changes), folder, sampler=Sampler(), resume=resume)
    sys.setprofile(None)
    return int(count.seen[0])  # type: ignore[attr-defined]  # a function carries its count


def main() -> None:
    """Forks a child for every request on stdin and answers {"signal", "events"}: torch is imported
    once for all."""
    for line in sys.stdin:
        read, write = os.pipe()
        if not (pid := os.fork()):
            events = child(**json.loads(line))
            os.write(write, str(events).encode())
            os._exit(0)
        os.close(write)
        events = os.read(read, 32).decode()
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        reply = {"signal": os.WTERMSIG(status), "events": int(events or 0)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
