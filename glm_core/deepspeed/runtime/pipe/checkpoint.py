"""Reads a pipeline's checkpoint, ours or DeepSpeed's, as one whole model's, from any number of
stages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from glm_core.deepspeed.checkpoint import (
    deepspeed_layout,
    layouts,
    own_layout,
    universal_checkpoint,
)
from glm_core.deepspeed.checkpoint.content import Content
from glm_core.deepspeed.checkpoint.files import MODEL, load_file
from glm_core.deepspeed.runtime.pipe.topology import PipelineParallelGrid
from glm_core.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The pipeline stage that reads a checkpoint."""

    grid: PipelineParallelGrid
    names: list[str]
    """its parameters in order"""
    group_members: list[str]
    """one parameter of each of its optimizer groups"""
    prefix: Callable[[int], str]
    """returns the prefix of a layer's names in the whole model"""


def read(place: Path, stage: Stage) -> Content:
    """Merges the files of all stages (of this tensor-parallel rank); the groups are those of this
    stage's optimizer. Raises CheckpointError."""
    layouts.require_folder(place)
    if universal_checkpoint.is_universal(place):
        raise CheckpointError(
            f"{place}: a universal checkpoint is not read into a pipeline; load the one it was "
            "made from, of any number of stages"
        )
    grid = stage.grid
    slices, own_slice = grid.slice_parallel_size, grid.get_slice_parallel_rank()
    files = enumerate(sorted(place.glob("mp_rank_*_model_states.pt")))
    every = {rank: load_file(path) for rank, path in files}
    models = _ordered(
        {r: m for r, m in every.items() if m.get("slice", r % slices) == own_slice}, grid
    )
    if not models:
        raise CheckpointError(f"{place}: holds no mp_rank_*_model_states.pt; use another tag")
    first = next(iter(models.values()))
    if first.get("format") == own_layout.FORMAT:
        content = own_layout.read(place, models)
    else:
        content = _read_deepspeeds(place, models, stage)
    return dataclasses.replace(content, groups=_groups_of(stage, content.groups))


def _ordered(
    models: dict[int, dict[str, Any]], grid: PipelineParallelGrid
) -> dict[int, dict[str, Any]]:
    """Orders the stages' model files; of a weight that several stages hold, the last file's value
    is taken. A tied layer's weights outside `tied_weight_attr` have the same name on each stage but
    different values. A stage takes its own where the number of stages is the same as when they were
    saved, else the first stage's."""
    ranks = sorted(models, reverse=True)
    if len(models) == grid.pipe_parallel_size:
        ranks.sort(key=lambda rank: rank == grid.ds_model_rank)
    return {rank: models[rank] for rank in ranks}


def _groups_of(stage: Stage, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the saved group of each of this stage's optimizer groups. They are matched by a
    parameter's name: a stage that has no parameter of a group lacks that group."""
    if not groups:
        return []
    own = []
    for name in stage.group_members:
        group = next((g for g in groups if name in g["params"]), None)
        if group is None:
            raise CheckpointError(
                f"checkpoint: no optimizer group holds {name}; pass load_module_only=True"
            )
        own.append(group)
    return own


def _read_deepspeeds(place: Path, models: dict[int, dict[str, Any]], stage: Stage) -> Content:
    """Reads weights from layer_XX-model_states.pt, and each stage's optimizer from the files beside
    them."""
    weights = _layers(place, stage)
    parts = []
    for rank, model in models.items():
        shapes = model.get("param_shapes") or []
        names = [name for group in shapes for name in group]
        if not shapes:  # ZeRO 0 numbers the optimizer's state in the stage's order
            model, names = _by_position(model, rank, len(models), stage)
        own = {n: weights[n] for n in names if n in weights}
        model = {**model, MODEL: own, "param_shapes": shapes}
        part = deepspeed_layout.read(place, model, rank, names)
        parts.append(dataclasses.replace(part, groups=_named(part.groups, shapes, names)))
    return dataclasses.replace(
        parts[0],
        module=weights | {n: w for part in parts for n, w in part.module.items()},
        state={n: s for part in parts for n, s in part.state.items()},
        groups=[g for part in parts for g in part.groups],
    )


def _by_position(
    model: dict[str, Any], rank: int, num_stages: int, stage: Stage
) -> tuple[dict[str, Any], list[str]]:
    """Returns what this stage needs of a ZeRO 0 model file, and the names of its parameters: all of
    its own file, and only the weights of other stages'."""
    own_stages = stage.grid.pipe_parallel_size
    if num_stages != own_stages:
        raise CheckpointError(
            f"optimizer state: DeepSpeed's ZeRO 0 on {num_stages} stages, here {own_stages}; load "
            "it on as many, or save it with ZeRO 1"
        )
    if rank != stage.grid.ds_model_rank:
        return {**model, "optimizer": None}, []
    return model, stage.names


def _named(
    groups: list[dict[str, Any]], shapes: list[dict[str, Any]], names: list[str]
) -> list[dict[str, Any]]:
    """Returns the groups with their parameters' names."""
    if not shapes:
        return [{**g, "params": [names[i] for i in g["params"]]} for g in groups if names]
    return [{**g, "params": list(s)} for g, s in zip(groups, shapes, strict=True)]


def _layers(place: Path, stage: Stage) -> dict[str, Tensor]:
    """Returns the weights of all layers by the whole model's names. Under tensor parallelism each
    rank has its own file of a layer."""
    grid = stage.grid
    slices = grid.slice_parallel_size
    own_slice = f"-model_{grid.get_slice_parallel_rank():02d}" if slices > 1 else ""
    pattern = re.compile(rf"layer_(\d+){own_slice}-model_states\.pt")
    weights: dict[str, Tensor] = {}
    for path in sorted(place.glob("layer_*-model_states.pt")):
        if match := pattern.fullmatch(path.name):
            prefix = stage.prefix(int(match[1]))
            weights |= {f"{prefix}{n}": w for n, w in load_file(path).items()}
    return weights
