"""Reads the checkpoints that DeepSpeed (0.19.8) writes, whose layout depends on the ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_core.deepspeed.checkpoint.content import COUNTERS, Content
from glm_core.deepspeed.checkpoint.files import MODEL, load_file
from glm_core.errors import CheckpointError

State = dict[str, dict[str, Any]]
"""`Content.state`"""

OWN_KEYS = {
    MODEL,
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    *COUNTERS,
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "checkpoint_parallel_dims",
    "universal_checkpoint_info",
}
"""keys of a model file that are DeepSpeed's; the others are the client's state"""


def read(place: Path, model: dict[str, Any], mp_rank: int, names: list[str]) -> Content:
    """Reads one model-parallel rank's part. model: the content of its model file; names: the
    parameters in the model's order, by which ZeRO 0 numbers its optimizer state. Raises
    CheckpointError."""
    if MODEL not in model or "ds_version" not in model:
        raise CheckpointError(
            f"{place}: not written by DeepSpeed or glm_core.deepspeed; use another"
        )
    files = _optimizer_files(place, mp_rank)
    if not files:
        state, groups = _stage_0(model, names)
        return content(model, state, groups, None)
    ranks = [load_file(f)["optimizer_state_dict"] for f in files]
    shapes = [dict(g) for g in model["param_shapes"]]
    state = (_stage_3 if "fp32_flat_groups" in ranks[0] else _stage_1_2)(ranks, shapes)
    groups = _torch_state(ranks[0])["param_groups"]
    return content(model, state, groups, ranks[0].get("loss_scaler"))


def content(
    model: dict[str, Any], state: State, groups: list[dict[str, Any]], scaler: Any
) -> Content:
    """Joins a model file's content, the optimizer's state and groups, and DeepSpeed's loss scaler
    object. Weights that the model file lacks (all of ZeRO 3's) are taken from the masters."""
    module = dict(model[MODEL])
    for group in model["param_shapes"] or []:
        for name, shape in group.items():
            if module.get(name) is None or module[name].shape != shape:
                module[name] = state[name]["fp32"].view(shape)
    return Content(
        module,
        state,
        groups,
        model.get("lr_scheduler"),
        _loss_scale(scaler),
        {n: model[n] for n in COUNTERS},
        {k: v for k, v in model.items() if k not in OWN_KEYS},
    )


def _optimizer_files(place: Path, mp_rank: int) -> list[Path]:
    """Returns the optimizer files in the order of the data-parallel ranks."""
    by_rank: dict[int, Path] = {}
    for path in place.glob(f"*zero_pp_rank_*_mp_rank_{mp_rank:02d}_optim_states.pt"):
        by_rank[int(path.name.partition("rank_")[2].partition("_")[0])] = path
    if sorted(by_rank) != list(range(len(by_rank))):
        raise CheckpointError(
            f"{place}: has optimizer files of ranks {sorted(by_rank)} only; copy all"
        )
    return [by_rank[r] for r in range(len(by_rank))]


def _torch_state(rank: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state dict of the torch optimizer that DeepSpeed wrapped."""
    state = rank.get("base_optimizer_state") or rank.get("optimizer_state_dict")
    if not isinstance(state, dict) or "param_groups" not in state:
        raise CheckpointError(
            "optimizer state: an elastic checkpoint, which DeepSpeed retired; save it again with a "
            "newer DeepSpeed"
        )
    return state


def _loss_scale(scaler: Any) -> dict[str, Any]:
    """Returns the state of our dynamic loss scale for DeepSpeed's scaler object."""
    old = getattr(scaler, "__dict__", {})
    if not old.get("dynamic"):
        return {}
    return {
        "scale": old["cur_scale"],
        "window": old["scale_window"],
        "minimum": old["min_scale"],
        "hysteresis": old["delayed_shift"],
        "good_steps": old["cur_iter"] - old["last_overflow_iter"] - 1,
        "overflows": old["delayed_shift"] - old["cur_hysteresis"],
    }


def _stage_1_2(ranks: list[Any], shapes: list[dict[str, Any]]) -> State:
    """Joins ZeRO 1's and 2's partitions. Each group is one flat vector in the order of
    param_shapes, cut into equal partitions, one per rank; padding follows the last parameter."""
    state: State = {}
    for g, group in enumerate(shapes):
        partitions = {"fp32": [r["single_partition_of_fp32_groups"][g] for r in ranks]}
        moments, scalars = _moments([_torch_state(r)["state"].get(g, {}) for r in ranks])
        vectors = {
            key: torch.cat([p.reshape(-1) for p in each])
            for key, each in (partitions | moments).items()
        }
        start = 0
        for name, shape in group.items():
            end = start + math.prod(shape)
            state[name] = {key: v[start:end] for key, v in vectors.items()} | scalars
            start = end
    return state


def _stage_3(ranks: list[Any], shapes: list[dict[str, Any]]) -> State:
    """Joins ZeRO 3's partitions. Every parameter is cut into equal partitions, the last one padded;
    a rank's vector is its partitions of all parameters, one after another."""
    vectors: dict[str, list[Tensor]] = {"fp32": [torch.cat(r["fp32_flat_groups"]) for r in ranks]}
    scalars: dict[str, Any] = {}
    for subgroup in range(len(ranks[0]["fp32_flat_groups"])):
        moments, more = _moments([_torch_state(r)["state"].get(subgroup, {}) for r in ranks])
        scalars |= more
        for key, each in moments.items():
            if subgroup:
                each = [torch.cat([a, b]) for a, b in zip(vectors[key], each, strict=True)]
            vectors[key] = each
    state: State = {}
    start = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        num_elements = math.prod(shape)
        end = start + -(-num_elements // len(ranks))
        state[name] = {
            key: torch.cat([v[start:end] for v in each])[:num_elements]
            for key, each in vectors.items()
        } | scalars
        start = end
    return state


def _moments(states: list[dict[str, Any]]) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """Separates the ranks' optimizer states: moments as one flat vector per rank, and scalars,
    which are the same on all."""
    moments: dict[str, list[Tensor]] = {}
    scalars: dict[str, Any] = {}
    for key, first in (states[0] if states else {}).items():
        if isinstance(first, Tensor) and first.numel() > 1:
            moments[key] = [s[key].reshape(-1) for s in states]
        else:
            scalars[key] = first
    return moments, scalars


def _stage_0(model: dict[str, Any], names: list[str]) -> tuple[State, list[dict[str, Any]]]:
    """Reads a plain torch optimizer's state, numbered by the parameters' order in the model."""
    optimizer = model.get("optimizer")
    state: State = {
        n: {"fp32": t.float().reshape(-1)} for n, t in model[MODEL].items() if n in names
    }
    if not isinstance(optimizer, dict):
        return state, []
    if "param_groups" not in optimizer:
        raise CheckpointError(
            "optimizer state: DeepSpeed's ZeRO 0 in 16 bit is not read; pass "
            "load_module_only=True, or save it with ZeRO 1"
        )
    for index, values in optimizer["state"].items():
        flat = {k: v.reshape(-1) if getattr(v, "ndim", 0) else v for k, v in values.items()}
        state[names[index]].update(flat)
    return state, list(optimizer["param_groups"])
