"""A pipeline's checkpoint, ours or DeepSpeed's, as one whole model's, whatever stages wrote it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from glm_core.deepspeed import checkpoint, foreign, universal
from glm_core.deepspeed.foreign import MODEL, Saved
from glm_core.errors import CheckpointError

if TYPE_CHECKING:
    from glm_core.deepspeed.runtime.pipe.engine import PipelineEngine


def read(place: Path, engine: PipelineEngine) -> Saved:
    """All stages' content in one (of this tensor-parallel slice), its groups those of this engine.
    Raises CheckpointError."""
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such checkpoint; `latest` or tag= must name a folder")
    if universal.is_universal(place):
        raise CheckpointError(
            f"{place}: a universal checkpoint is not read into a pipeline; load the one it was "
            "made from, of any number of stages"
        )
    files = sorted(place.glob("mp_rank_*_model_states.pt"))
    slices, own = engine.grid.slice_parallel_size, engine.grid.get_slice_parallel_rank()
    every = {rank: foreign.load_file(f) for rank, f in enumerate(files)}
    facts = _ordered({r: f for r, f in every.items() if f.get("slice", r % slices) == own}, engine)
    if not facts:
        raise CheckpointError(f"{place}: holds no mp_rank_*_model_states.pt; use another tag")
    first = next(iter(facts.values()))
    if first.get("format") == checkpoint.FORMAT:
        found = checkpoint.read_ours(place, facts)
    else:
        found = _read_deepspeeds(place, facts, engine)
    return dataclasses.replace(found, groups=_groups_of(engine, found.groups))


def _ordered(facts: dict[int, dict[str, Any]], engine: PipelineEngine) -> dict[int, Any]:
    """What is taken last wins. Weights of a tied layer that are not tied have one name and a value
    on each stage: its own where the stages are as many, else the first stage's."""
    ranks = sorted(facts, reverse=True)
    if len(facts) == engine.num_stages:
        ranks.sort(key=lambda rank: rank == engine.grid.ds_model_rank)
    return {rank: facts[rank] for rank in ranks}


def _groups_of(engine: PipelineEngine, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of this engine's optimizer groups the saved one that its first parameter was in: a
    stage without a parameter of a group has not got that group."""
    if not groups:
        return []
    found = []
    for holder in engine.holders:
        name = engine.names[holder.params[0]]
        group = next((g for g in groups if name in g["params"]), None)
        if group is None:
            raise CheckpointError(f"checkpoint: no optimizer group holds {name}; load_module_only")
        found.append(group)
    return found


def _read_deepspeeds(
    place: Path, facts: dict[int, dict[str, Any]], engine: PipelineEngine
) -> Saved:
    """Weights of layer_XX-model_states.pt, each stage's optimizer beside them."""
    weights = _layers(place, engine)
    parts = []
    for rank, own in facts.items():
        shapes = own.get("param_shapes") or []
        names = [name for group in shapes for name in group]
        if not shapes:  # ZeRO 0: the optimizer's state is by position, in the stage's order
            own, names = _by_position(own, rank, len(facts), engine)
        mine = {n: weights[n] for n in names if n in weights}
        part = foreign.read(place, {**own, MODEL: mine, "param_shapes": shapes}, rank, names)
        parts.append(dataclasses.replace(part, groups=_named(part.groups, shapes, names)))
    first = parts[0]
    return dataclasses.replace(
        first,
        module=weights | {n: w for part in parts for n, w in part.module.items()},
        state={n: s for part in parts for n, s in part.state.items()},
        groups=[g for part in parts for g in part.groups],
    )


def _by_position(
    own: dict[str, Any], rank: int, stages: int, engine: PipelineEngine
) -> tuple[dict[str, Any], list[str]]:
    """What of a ZeRO 0 stage's file is this engine's, and its parameters' names."""
    if stages != engine.num_stages:
        raise CheckpointError(
            f"optimizer state: DeepSpeed's ZeRO 0 on {stages} stages, here {engine.num_stages}; "
            "load it on as many, or save it with ZeRO 1"
        )
    if rank != engine.grid.ds_model_rank:
        return {**own, "optimizer": None}, []
    return own, list(engine.names.values())


def _named(
    groups: list[dict[str, Any]], shapes: list[dict[str, Any]], names: list[str]
) -> list[dict[str, Any]]:
    """The groups with their parameters' names."""
    if not shapes:
        return [{**g, "params": [names[i] for i in g["params"]]} for g in groups if names]
    return [{**g, "params": list(s)} for g, s in zip(groups, shapes, strict=True)]


def _layers(place: Path, engine: PipelineEngine) -> dict[str, Tensor]:
    """The weights of all layers by the whole model's names. Under tensor parallelism each rank has
    its own file of a layer."""
    slices = engine.grid.slice_parallel_size
    mine = f"-model_{engine.grid.get_slice_parallel_rank():02d}" if slices > 1 else ""
    pattern = re.compile(rf"layer_(\d+){mine}-model_states\.pt")
    weights: dict[str, Tensor] = {}
    for path in sorted(place.glob("layer_*-model_states.pt")):
        if match := pattern.fullmatch(path.name):
            prefix = engine.module.prefix(int(match[1]))
            weights |= {f"{prefix}{n}": w for n, w in foreign.load_file(path).items()}
    return weights
