"""Reads and writes the universal layout, which has one folder per parameter
(deepspeed/checkpoint/ds_to_universal.py, 0.19.8)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_core.deepspeed.checkpoint import deepspeed_layout
from glm_core.deepspeed.checkpoint.content import Content
from glm_core.deepspeed.checkpoint.files import (
    MODEL,
    load_file,
    load_object,
    model_file,
    zero3_model_file,
)
from glm_core.errors import CheckpointError

LATEST = "latest_universal"
ZERO, COMMON = "zero", "optimizer_state.pt"
VERSION = 0.4
"""of the layout"""


def is_universal(place: Path) -> bool:
    """Does the folder hold this layout?"""
    return (place / ZERO / COMMON).is_file()


def read(place: Path, model: dict[str, Any]) -> Content:
    """Reads a universal checkpoint. model: the content of its model file. Raises
    CheckpointError."""
    common = load_file(place / ZERO / COMMON)
    inner = common.get("optimizer_state_dict", {})  # only ZeRO 3 writes one
    first: dict[str, Any] = next(iter(inner.get("state", {}).values()), {})
    shapes = {n: s for group in model["param_shapes"] or [] for n, s in group.items()}
    state = {n: _read_parameter(place / ZERO / n, math.prod(s)) for n, s in shapes.items()}
    for values in state.values():
        if "step" not in values and "step" in first:
            values["step"] = first["step"]
    groups = common.get("param_groups") or inner.get("param_groups") or []
    return deepspeed_layout.content(model, state, groups, common.get("loss_scaler"))


def _read_parameter(folder: Path, num_elements: int) -> dict[str, Any]:
    """Returns the master and the moments, flattened, and the step."""
    values: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pt")):
        value = load_object(path)
        if path.stem == "step":
            values["step"] = value
            continue
        tensor = value["param"] if isinstance(value, dict) else value
        if tensor.numel() != num_elements:
            raise CheckpointError(
                f"{path}: has {tensor.numel()} elements where the parameter has {num_elements}; a "
                "padded vocabulary or tensor-parallel ranks are not read: load it with DeepSpeed "
                "and save it on one rank"
            )
        values[path.stem] = tensor.reshape(-1)
    if "fp32" not in values:
        raise CheckpointError(f"{folder}: no fp32.pt; convert the checkpoint again")
    return values


def write(content: Content, place: Path) -> None:
    """Writes the layout into `place`, and `latest_universal` beside it. DeepSpeed reads it in ZeRO
    1 to 3."""
    shapes = {n: content.module[n].shape for n in content.state}
    for name, values in content.state.items():
        _write_parameter(place / ZERO / name, shapes[name], values)
    steps = [{"step": v["step"]} for v in content.state.values() if "step" in v]
    version = {"ds_version": "0.19.8"}
    common = {
        **version,
        "zero_stage": 1,
        "param_groups": content.groups,
        "optimizer_state_dict": {"state": dict(enumerate(steps)), "param_groups": content.groups},
    }
    torch.save(common, place / ZERO / COMMON)
    model = {
        **version,
        MODEL: content.module,
        **content.counters,
        **content.client,
        "lr_scheduler": content.lr_scheduler,
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
    for name in (model_file(0), zero3_model_file(0, 0)):
        torch.save(model, place / name)
    (place.parent / LATEST).write_text(place.name, encoding="utf-8")


def _write_parameter(folder: Path, shape: torch.Size, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in values.items():
        if isinstance(value, Tensor) and value.numel() == math.prod(shape):
            # a clone: torch saves the whole storage behind a view
            whole = value.reshape(shape).clone()
            torch.save({"param": whole, "cat_dim": 0}, folder / f"{key}.pt")
        elif key == "step":
            torch.save(value, folder / "step.pt")
