"""Finds out which layout a checkpoint has, and reads it."""

from __future__ import annotations

from pathlib import Path

from glm_core.deepspeed.checkpoint import deepspeed_layout, own_layout, universal_checkpoint
from glm_core.deepspeed.checkpoint.content import Content
from glm_core.deepspeed.checkpoint.files import load_file, model_file, zero3_model_file
from glm_core.deepspeed.notices import say_once
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST


def find(folder: Path, tag: str | None, *, universal: bool) -> Path | None:
    """Returns the checkpoint's folder: that of the tag, or without one of the tag that `latest`
    names (universal: `latest_universal`). None where there is no `latest` file. Raises
    CheckpointError where there is no `latest_universal`."""
    if tag is not None:
        return folder / tag
    latest = universal_checkpoint.LATEST if universal else LATEST
    try:
        return folder / (folder / latest).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if universal:
            raise CheckpointError(f"{folder}: no {latest} file; pass tag=") from None
        say_once(f"{folder}: no {latest} file, nothing loaded; pass tag=")
        return None


def read(place: Path, mp_rank: int, names: list[str]) -> Content:
    """Reads one model-parallel rank's part of a checkpoint in any layout. names: the parameters in
    the model's order, by which DeepSpeed's ZeRO 0 numbers its optimizer state. Raises
    CheckpointError."""
    require_folder(place)
    path = place / model_file(mp_rank)
    model = load_file(path if path.exists() else place / zero3_model_file(0, mp_rank))
    if universal_checkpoint.is_universal(place):
        return universal_checkpoint.read(place, model)
    if model.get("format") != own_layout.FORMAT:
        return deepspeed_layout.read(place, model, mp_rank, names)
    if model["stages"] > 1:
        raise CheckpointError(f"{place}: is a pipeline's; load it into a PipelineModule")
    return own_layout.read(place, {mp_rank: model})


def require_folder(place: Path) -> None:
    """Raises CheckpointError where there is no such folder."""
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such checkpoint; `latest` or tag= must name a folder")
