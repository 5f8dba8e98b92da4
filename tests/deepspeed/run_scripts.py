"""One rank: runs scripts one after the other under one package and saves what they saw."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def whole_weights(deepspeed: Any, engine: Any) -> dict[str, torch.Tensor]:
    """Returns the whole weights by name, whatever the stage."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}


def consolidate(folder: Path) -> None:
    """Writes DeepSpeed's own whole weights beside each of its checkpoints."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for place in (p.parent for p in folder.glob("*/latest")):
        if any(place.glob("*/layer_*")):
            continue  # a pipeline's: its own script knows none
        if place.name.startswith("parts"):
            to_universal(place / "end", place / "universal" / "end")
        torch.save(
            dict(get_fp32_state_dict_from_zero_checkpoint(str(place))), place / "consolidated.pt"
        )


def sum_in_bfloat16(deepspeed: Any) -> None:
    """Makes bfloat16 scripts sum gradients over ranks in bfloat16, as DeepSpeed does."""
    usual = deepspeed.initialize

    def initialize(*args: Any, **kwargs: Any) -> Any:
        if "bf16" in (kwargs.get("config") or {}):
            kwargs["config"] = {**kwargs["config"], "communication_data_type": "bf16"}
        return usual(*args, **kwargs)

    deepspeed.initialize = initialize


def to_universal(place: Path, out: Path) -> None:
    """Runs DeepSpeed's own conversion."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main as convert

    convert(
        Namespace(
            input_folder=str(place),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def main(out: str, names: list[str]) -> None:
    if os.environ["PEER"] == "deepspeed":
        import deepspeed

        # a shared-memory all-reduce that would be compiled for minutes; gloo is what is compared
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        import glm_core.deepspeed as deepspeed
    sys.path.insert(0, str(HERE))
    if os.environ["PEER"] == "otherwise":
        sum_in_bfloat16(deepspeed)
    deepspeed.init_distributed("gloo")
    seen: dict[str, Any] = {}
    torch.save(seen, f"{out}.{dist.get_rank()}.part")
    for name in names:
        script = runpy.run_path(str(next(HERE.glob(f"*/{name}.py"))))
        if "engine" not in script:
            continue  # it checked itself
        weights = whole_weights(deepspeed, script["engine"])
        lists = {k: [v for v in script[k] if v is not None] for k in ("losses", "norms", "rates")}
        seen[name] = {**{k: torch.tensor(v) for k, v in lists.items()}, "weights": weights}
        torch.save(seen, f"{out}.{dist.get_rank()}.part")
    if os.environ["PEER"] == "deepspeed" and dist.get_rank() == 0:
        consolidate(Path(os.environ["CHECKPOINTS"]))
    os.replace(f"{out}.{dist.get_rank()}.part", f"{out}.{dist.get_rank()}")
    dist.barrier()
    os._exit(0)  # DeepSpeed's exit handlers take seconds


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
