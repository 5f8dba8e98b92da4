"""Training runs as checkpoints: where weights and tokenizer lie, and what model they hold."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import FOLDER, FORMAT, LATEST, digest

MANY_PROCESSES = ("facts.json", ".metadata")
"""files in a checkpoint of a run on many processes (glm_core.distributed.dcp_reader)"""


def checkpoints_folder(path: Path) -> Path:
    """Returns a run's folder of checkpoints, or `path` itself where it is no run."""
    return path / FOLDER if (path / FOLDER / LATEST).is_file() else path


def run_config(path: Path) -> dict[str, Any] | None:
    """Returns the config of the run that wrote a checkpoint, None if `path` is no such checkpoint.
    Raises CheckpointError where it is damaged."""
    facts = _facts(path)
    if facts is None:
        return None
    try:
        config: dict[str, Any] = json.loads(facts)["config"]
        config["model"]["num_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged, it does not say what model it holds ({error!r}); use another "
            "checkpoint of the run"
        ) from None
    return config


def _facts(path: Path) -> str | None:
    """Returns the facts of a run's checkpoint as JSON: of a file, or of a folder that many
    processes wrote."""
    if all((path / name).is_file() for name in MANY_PROCESSES):
        return (path / MANY_PROCESSES[0]).read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # whoever reads the tensors says what is wrong
    return header.get("facts", "") if header.get("format") == FORMAT else None


def sharded_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of every tensor in a checkpoint of many processes. Raises
    CheckpointError."""
    from glm_core.distributed import dcp_reader  # imported where it is needed: it takes a second

    return dcp_reader.list_tensors(folder)


def read_sharded(
    folder: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Returns one tensor of a checkpoint of many processes. Raises CheckpointError where files are
    missing or damaged."""
    from glm_core.distributed import dcp_reader

    return dcp_reader.read_tensor(folder, key, shape, dtype)


@functools.lru_cache(maxsize=8)
def verify(file: Path, changed_ns: int) -> None:
    """Compares a run's checkpoint with its checksum, one tensor at a time and once for each state
    of the file; other files have none. Raises CheckpointError."""
    with safe_open(file, framework="pt") as opened:
        header: dict[str, str] = opened.metadata() or {}
        if header.get("format") != FORMAT:
            return
        if digest(_Tensors(opened), header.get("facts", "")) != header.get("sha256"):
            raise CheckpointError(
                f"{file}: damaged, its checksum does not match; use another checkpoint of the run"
            )


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of an open file by name, each read when it is asked for."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.keys())

    def __len__(self) -> int:
        return len(self._opened.keys())


def home(file: Path) -> Path:
    """Returns the folder of a run's tokenizer, given one of its checkpoints."""
    return file.parent.parent if file.parent.name == FOLDER else file.parent
