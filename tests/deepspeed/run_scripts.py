"""One rank: runs scripts one after the other under one package and saves what they saw. A script
named `otherwise:NAME` runs with other roundings."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def whole_weights(deepspeed: Any, engine: Any) -> dict[str, torch.Tensor]:
    """Returns the whole weights by name, whatever the stage."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}


@contextlib.contextmanager
def rounded_otherwise(deepspeed: Any) -> Iterator[None]:
    """Turns the rows of micro-batches round, and makes bfloat16 scripts sum gradients over ranks in
    bfloat16, as DeepSpeed does."""
    small = importlib.import_module("small")
    usual = deepspeed.initialize

    def initialize(*args: Any, **kwargs: Any) -> Any:
        if "bf16" in (kwargs.get("config") or {}):
            kwargs["config"] = {**kwargs["config"], "communication_data_type": "bf16"}
        return usual(*args, **kwargs)

    with (
        mock.patch.object(small, "otherwise", True),
        mock.patch.object(deepspeed, "initialize", initialize),
        mock.patch.dict(os.environ, CHECKPOINTS=f"{os.environ['CHECKPOINTS']}-otherwise"),
    ):
        yield


def main(out: str, names: list[str]) -> None:
    if os.environ["PEER"] == "deepspeed":
        import deepspeed

        # a shared-memory all-reduce that would be compiled for minutes; gloo is what is compared
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        import glm_core.deepspeed as deepspeed
    sys.path.insert(0, str(HERE))
    deepspeed.init_distributed("gloo")
    seen: dict[str, Any] = {}
    torch.save(seen, f"{out}.{dist.get_rank()}.part")
    for name in names:
        how, _, file = name.rpartition(":")
        with rounded_otherwise(deepspeed) if how else contextlib.nullcontext():
            script = runpy.run_path(str(next(HERE.glob(f"*/{file}.py"))))
        if "engine" not in script:
            continue  # it checked itself
        weights = whole_weights(deepspeed, script["engine"])
        lists = {k: [v for v in script[k] if v is not None] for k in ("losses", "norms", "rates")}
        seen[name] = {**{k: torch.tensor(v) for k, v in lists.items()}, "weights": weights}
        torch.save(seen, f"{out}.{dist.get_rank()}.part")
    if os.environ["PEER"] == "deepspeed" and dist.get_rank() == 0:
        importlib.import_module("consolidate").consolidate(Path(os.environ["CHECKPOINTS"]))
    os.replace(f"{out}.{dist.get_rank()}.part", f"{out}.{dist.get_rank()}")
    dist.barrier()
    os._exit(0)  # DeepSpeed's exit handlers take seconds


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
