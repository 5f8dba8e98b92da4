"""Universal checkpoints, one folder per parameter (deepspeed/checkpoint/ds_to_universal.py,
0.19.8): read, and written from any checkpoint of one model-parallel rank by
`python -m glm_core.deepspeed.universal --input_folder TAG_FOLDER --output_folder FOLDER`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_core.deepspeed import foreign
from glm_core.deepspeed.foreign import Saved
from glm_core.errors import CheckpointError

LATEST = "latest_universal"
ZERO, COMMON = "zero", "optimizer_state.pt"
VERSION = 0.4
"""of the layout"""


def is_universal(place: Path) -> bool:
    """Does `place` hold that layout?"""
    return (place / ZERO / COMMON).is_file()


def read(place: Path, facts: dict[str, Any]) -> Saved:
    """facts: the model file's content. Raises CheckpointError."""
    common = foreign.load_file(place / ZERO / COMMON)
    inner = common.get("optimizer_state_dict", {})  # of stage 3
    first: dict[str, Any] = next(iter(inner.get("state", {}).values()), {})
    shapes = {n: s for group in facts["param_shapes"] or [] for n, s in group.items()}
    state = {n: _parameter(place / ZERO / n, math.prod(s)) for n, s in shapes.items()}
    for values in state.values():
        if "step" not in values and "step" in first:
            values["step"] = first["step"]
    groups = common.get("param_groups") or inner.get("param_groups") or []
    return foreign.saved(facts, state, groups, common.get("loss_scaler"))


def _parameter(folder: Path, size: int) -> dict[str, Any]:
    """fp32 and the moments, flat; the step."""
    values: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pt")):
        value = foreign.load_object(path)
        if path.stem == "step":
            values["step"] = value
            continue
        tensor = value["param"] if isinstance(value, dict) else value
        if tensor.numel() != size:
            raise CheckpointError(
                f"{path}: {tensor.numel()} elements for {size}: of a padded vocabulary or of "
                "tensor-parallel ranks; load it with DeepSpeed and save it on one rank"
            )
        values[path.stem] = tensor.reshape(-1)
    if "fp32" not in values:
        raise CheckpointError(f"{folder}: no fp32.pt; convert the checkpoint again")
    return values


def write(saved: Saved, place: Path) -> None:
    """The layout in `place`, and beside it `latest_universal`; for DeepSpeed's stages 1 to 3."""
    shapes = {n: saved.module[n].shape for n in saved.state}
    for name, values in saved.state.items():
        folder = place / ZERO / name
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in values.items():
            if isinstance(value, Tensor) and value.numel() == math.prod(shapes[name]):
                # contents of a view would be saved with all its storage
                whole = value.reshape(shapes[name]).clone()
                torch.save({"param": whole, "cat_dim": 0}, folder / f"{key}.pt")
            elif key == "step":
                torch.save(value, folder / "step.pt")
    steps = [{"step": v["step"]} for v in saved.state.values() if "step" in v]
    version = {"ds_version": "0.19.8"}
    common = {
        **version,
        "zero_stage": 1,
        "param_groups": saved.groups,
        "optimizer_state_dict": {"state": dict(enumerate(steps)), "param_groups": saved.groups},
    }
    torch.save(common, place / ZERO / COMMON)
    facts = {
        **version,
        foreign.MODEL: saved.module,
        **saved.counters,
        **saved.client,
        "lr_scheduler": saved.lr_scheduler,
        "optimizer": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "param_shapes": [shapes],
        "buffer_names": [],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
    }
    for name in (foreign.model_file(0), foreign.model_file_3(0, 0)):
        torch.save(facts, place / name)
    (place.parent / LATEST).write_text(place.name)


def main(words: list[str] | None = None) -> None:
    """DeepSpeed's command by its options."""
    from glm_core.deepspeed import checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_folder", type=Path, required=True, help="of one tag")
    parser.add_argument("--output_folder", type=Path, required=True)
    args = parser.parse_args(words)
    write(checkpoint.read(args.input_folder, 0, []), args.output_folder)


if __name__ == "__main__":
    main()
