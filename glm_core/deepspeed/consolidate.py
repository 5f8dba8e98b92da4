"""`deepspeed.utils.zero_to_fp32`: a checkpoint's float32 weights, whole, as one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glm_core.deepspeed import checkpoint
from glm_core.deepspeed.foreign import Saved, load_file, model_file, model_file_3
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST, replace


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None
) -> dict[str, Tensor]:
    """The masters in the parameters' shapes, other entries of the state dict as they were saved;
    ours, a pipeline's too, or DeepSpeed's checkpoint of one model-parallel rank. Raises
    CheckpointError."""
    folder = Path(checkpoint_dir)
    if tag is None:
        try:
            tag = (folder / LATEST).read_text().strip()
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no {LATEST} file; pass tag=") from None
    place = folder / tag
    saved = _read(place)
    state = saved.state
    return {
        name: state[name]["fp32"].view(value.shape).clone() if name in state else value
        for name, value in saved.module.items()
    }


def _read(place: Path) -> Saved:
    ranks = range(len(list(place.glob(model_file(0).replace("00", "*")))))
    if len(ranks) > 1:
        # of a weight on several stages the first stage's is taken
        every = {rank: load_file(place / model_file(rank)) for rank in reversed(ranks)}
        if every[0].get("stages") == len(ranks):
            return checkpoint.read_ours(place, every)
    if len(ranks) > 1 or (place / model_file_3(0, 1)).exists():
        raise CheckpointError(
            f"{place}: model-parallel; load it with an mpu instead, or DeepSpeed's pipeline into a "
            "PipelineModule and save that"
        )
    return checkpoint.read(place, 0, [])


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path, output_dir: str | Path, tag: str | None = None
) -> Path:
    """Writes output_dir/pytorch_model.bin, or output_dir itself where it is named like a file."""
    path = Path(output_dir)
    path = path if path.suffix in (".bin", ".pt") else path / "pytorch_model.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    replace(path, lambda part: torch.save(weights, part))
    return path
