"""Reads and writes our own layout: the weights are in one model file per model-parallel rank, and
every rank's own file has its spans of masters and moments, so that any stage and number of ranks
can read them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.checkpoint.content import COUNTERS, Content
from glm_core.deepspeed.checkpoint.files import MODEL, load_file, model_file
from glm_core.deepspeed.notices import say_once
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST, replace

FORMAT = "glm-core deepspeed checkpoint 1"


class TagMismatch(CheckpointError, AssertionError):
    """Ranks save under different tags; an AssertionError, as in DeepSpeed."""


class SavedSpan(TypedDict):
    """A rank's consecutive elements of one flattened parameter."""

    name: str
    start: int
    """the first element's index in the flattened parameter"""
    values: dict[str, Any]
    """`fp32` (the master) and moments of these elements; scalars such as `step`"""


class RankFile(TypedDict):
    """The content of the file that every rank writes."""

    format: str
    mp_rank: int
    pieces: list[SavedSpan]
    """this rank's spans; the key's name is part of the format"""
    groups: list[dict[str, Any]]
    """the optimizer's groups with parameter names for `params`"""


def model_contents(
    weights: dict[str, Any],
    *,
    lr_scheduler: dict[str, Any] | None,
    loss_scale: dict[str, Any],
    slice_rank: int,
    stages: int,
    counters: dict[str, int],
    client: dict[str, Any],
) -> dict[str, Any]:
    """Returns the content of a model file. slice_rank: the tensor-parallel rank; stages: how many
    pipeline stages' files make one model. Raises CheckpointError where the client state has a
    reserved key."""
    own = {
        "format": FORMAT,
        MODEL: weights,
        "lr_scheduler": lr_scheduler,
        "loss_scale": loss_scale,
        "writers": dist.get_world_size(),
        "slice": slice_rank,
        "stages": stages,
        **counters,
    }
    if shadowed := sorted(own.keys() & client.keys()):
        raise CheckpointError(f"client_state: keys {', '.join(shadowed)} are reserved; rename them")
    return {**own, "client_state": client}


def write(
    folder: Path, tag: str, rank_file: RankFile, model: dict[str, Any] | None, *, latest: bool
) -> None:
    """Writes folder/tag: this rank's file and, where `model` is given, its model file. When every
    rank has written, rank 0 moves `latest` to the tag if asked to. Raises CheckpointError on every
    rank if any could not write."""
    place, problem = folder / tag, ""
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(place / f"glm_core_rank_{dist.get_rank():05d}.pt", rank_file)
        if model is not None:
            _write(place / model_file(rank_file["mp_rank"]), model)
    except OSError as error:
        problem = f"{place}: not saved ({error}); make room, then save again"
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if failed := [p for p in problems if p]:
        raise CheckpointError(failed[0])
    if latest and dist.get_rank() == 0:
        replace(folder / LATEST, lambda part: part.write_text(tag, encoding="utf-8"))
    dist.barrier()


def _write(path: Path, value: Any) -> None:
    # not `replace`: it clears its scratch folder, which ranks would share
    scratch = path.with_suffix(".part")
    torch.save(value, scratch)
    scratch.rename(path)


def check_tag(tag: str, mode: str) -> None:
    """Compares the tag over all ranks. Where they differ, mode `fail` raises TagMismatch,
    `warn` prints a line and `ignore` does not compare."""
    if mode == "ignore":
        return
    tags: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(tags, hashlib.sha256(tag.encode()).hexdigest())
    if len(set(tags)) > 1:
        text = f"checkpoint tag {tag!r}: not the same on all ranks; give one tag"
        if mode == "fail":
            raise TagMismatch(text)
        say_once(text)


def read(place: Path, models: dict[int, dict[str, Any]]) -> Content:
    """Merges model files into one content. models: their contents by model-parallel rank; where
    several hold the same weight, the last one's is taken. Raises CheckpointError."""
    first = next(iter(models.values()))
    if len(models) != first["stages"]:
        raise CheckpointError(
            f"{place}: {len(models)} of {first['stages']} stages' files are there; use another tag"
        )
    files = sorted(place.glob("glm_core_rank_*.pt"))
    if len(files) != first["writers"]:
        raise CheckpointError(
            f"{place}: {len(files)} of {first['writers']} ranks' files are there; use another tag"
        )
    order = list(models)
    ranks = [f for f in map(load_file, files) if f["mp_rank"] in models]
    ranks.sort(key=lambda f: order.index(f["mp_rank"]))
    module = {name: value for model in models.values() for name, value in model[MODEL].items()}
    # ranks of one stage have the same groups, each stage has its own
    with_groups = ranks if len(models) > 1 else ranks[:1]
    return Content(
        module,
        _assemble([span for rank in ranks for span in rank["pieces"]], module),
        [group for rank in with_groups for group in rank["groups"]],
        first["lr_scheduler"],
        _loss_scale(first["loss_scale"]),
        {name: first[name] for name in COUNTERS},
        first["client_state"],
    )


def _loss_scale(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the loss scale's state in today's fields; the first checkpoints had `steps`,
    `last_overflow` and `left` in place of `good_steps` and `overflows`."""
    if "left" not in state:
        return state
    same = {k: v for k, v in state.items() if k not in ("steps", "last_overflow", "left")}
    return {
        **same,
        "good_steps": state["steps"] - state["last_overflow"] - 1,
        "overflows": state["hysteresis"] - state["left"],
    }


def _assemble(spans: list[SavedSpan], weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Joins all ranks' spans to whole flat tensors, by parameter and key."""
    whole: dict[str, dict[str, Any]] = {}
    for span in spans:
        values = whole.setdefault(span["name"], {})
        start, count = span["start"], len(span["values"]["fp32"])
        for key, value in span["values"].items():
            if isinstance(value, Tensor) and value.ndim == 1 and len(value) == count:
                if key not in values:
                    num_elements = weights[span["name"]].numel()
                    values[key] = torch.zeros(num_elements, dtype=value.dtype)
                values[key][start : start + count] = value
            else:
                values[key] = value
    return whole
