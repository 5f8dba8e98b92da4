"""Makes what DeepSpeed itself makes of its checkpoints: whole weights and universal checkpoints."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from deepspeed.checkpoint.ds_to_universal import main as convert
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


def consolidate(folder: Path) -> None:
    """Writes DeepSpeed's own whole weights beside each of its checkpoints."""
    for place in (p.parent for p in folder.glob("*/latest")):
        if any(place.glob("*/layer_*")):
            continue  # a pipeline's: its own script knows none
        if place.name.startswith("parts"):
            to_universal(place / "end", place / "universal" / "end")
        torch.save(
            dict(get_fp32_state_dict_from_zero_checkpoint(str(place))), place / "consolidated.pt"
        )


def to_universal(place: Path, out: Path) -> None:
    """Runs DeepSpeed's own conversion."""
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
