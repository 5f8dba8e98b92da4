"""Writes a checkpoint's whole float32 weights as one file (`deepspeed.utils.zero_to_fp32`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.deepspeed.checkpoint import layouts, own_layout
from glm_core.deepspeed.checkpoint.content import Content
from glm_core.deepspeed.checkpoint.files import load_file, model_file, zero3_model_file
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None
) -> dict[str, Tensor]:
    """Returns the state dict with each parameter's float32 master in its place; buffers are as they
    were saved. Reads our checkpoints, a pipeline's too, and DeepSpeed's of one model-parallel
    rank. Raises CheckpointError."""
    folder = Path(checkpoint_dir)
    if tag is None:
        try:
            tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no {LATEST} file; pass tag=") from None
    content = _read(folder / tag)
    masters = {
        _memory(value): content.state[name]["fp32"].view(value.shape).clone()
        for name, value in content.module.items()
        if name in content.state
    }
    return {n: masters.get(_memory(value), value) for n, value in content.module.items()}


def _memory(value: Tensor) -> tuple[Any, ...]:
    """Returns what is equal for names of one parameter only."""
    start = value.untyped_storage().data_ptr() if value.numel() else id(value)
    return start, value.storage_offset(), value.shape


def _read(place: Path) -> Content:
    ranks = range(len(list(place.glob(model_file(0).replace("00", "*")))))
    if len(ranks) > 1:
        # the last file read wins: for a weight that several stages hold, the first stage's
        files = {rank: load_file(place / model_file(rank)) for rank in reversed(ranks)}
        if files[0].get("stages") == len(ranks):
            return own_layout.read(place, files)
    if len(ranks) > 1 or (place / zero3_model_file(0, 1)).exists():
        raise CheckpointError(
            f"{place}: holds several model-parallel ranks; load it with an mpu instead, or load "
            "DeepSpeed's pipeline into a PipelineModule and save that"
        )
    return layouts.read(place, 0, [])


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Returns the model, on the CPU, with the checkpoint's float32 weights in it. Call it inside
    GatheredParameters for a model of ZeRO 3. Raises CheckpointError."""
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    if any(p.device.type != "cpu" for p in model.parameters()):
        model.cpu()
    own = model.state_dict(keep_vars=True)
    if odd := sorted(own.keys() ^ weights.keys()):
        raise CheckpointError(f"{checkpoint_dir}: does not fit the model; only one has {odd[:5]}")
    with torch.no_grad():  # not load_state_dict: FSDP2's hooks fail inside GatheredParameters
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path, output_dir: str | Path, tag: str | None = None
) -> Path:
    """Writes the weights and returns the file's path: output_dir itself where it ends in .bin or
    .pt, else pytorch_model.bin inside it."""
    path = Path(output_dir)
    path = path if path.suffix in (".bin", ".pt") else path / "pytorch_model.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    scratch = path.with_suffix(f".{os.getpid()}")  # every rank may call this
    torch.save(weights, scratch)
    scratch.replace(path)
    return path
