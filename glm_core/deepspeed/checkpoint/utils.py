"""Names a checkpoint's files and copies tensors to be saved (`deepspeed.checkpoint.utils`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def get_model_ckpt_name_for_rank(base_folder: str | Path, mp_rank_str: str) -> str:
    """Returns the path of a model-parallel rank's weights."""
    return str(Path(base_folder) / f"mp_rank_{mp_rank_str}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str | Path, dp_rank: int, mp_rank: int) -> str:
    """Returns the path of a data-parallel rank's optimizer state, in DeepSpeed's layout. (Ours has
    one file per rank, `glm_core_rank_*.pt`.)"""
    name = f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
    return str(Path(base_folder) / name)


def get_layer_ckpt_name_for_rank(base_folder: str | Path, layer_id: str, tp_rank: int) -> str:
    """Returns the path of a pipeline layer's weights."""
    return str(Path(base_folder) / f"{layer_id}-model_{tp_rank:02d}_model_states.pt")


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Returns `item` with copies of the tensors inside its lists, tuples and dicts, on `device`. A
    copy is saved alone; a view would be saved with all of its storage."""
    if isinstance(item, Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, dict):
        copied = {k: clone_tensors_for_torch_save(v, device) for k, v in item.items()}
        return type(item)(copied)
    if isinstance(item, list | tuple):
        copies = [clone_tensors_for_torch_save(v, device) for v in item]
        return copies if isinstance(item, list) else tuple(copies)
    return item
