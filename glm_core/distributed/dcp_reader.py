"""Reads a distributed checkpoint without running code that its files name."""

from __future__ import annotations

import functools
import json
import pathlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from glm_core.errors import CheckpointError
from glm_core.versions import file_digest

METADATA, FACTS, SUMS = ".metadata", "facts.json", ".sha256"
"""files of a checkpoint: what DCP says of its tensors, what we say of the run, and the endings of
the tables of checksums"""
_ALLOWED = {
    *((dcp.__name__, name) for name in ["Metadata", "MetadataIndex", "StorageMeta"]),
    *((dcp.__name__, name) for name in ["ChunkStorageMetadata", "TensorStorageMetadata"]),
    *((dcp.__name__, name) for name in ["TensorProperties", "_MEM_FORMAT_ENCODING"]),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
"""what describes tensors in a .metadata file: nothing else is built. BytesStorageMetadata is left
out on purpose, because DCP unpickles the bytes that it describes."""


class SafeReader(FileSystemReader):
    """Reads a folder as DCP's own reader does, but unpickles nothing except the description of
    tensors. DCP reads the tensors themselves with torch.load(weights_only=True)."""

    refused: CheckpointError | None = None
    """why the metadata was not read: DCP of torch 2.11 says only that it has none"""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """Returns the checkpoint's metadata. Raises CheckpointError where its pickle names anything
        else."""
        file = Path(self.path) / METADATA
        try:
            with file.open("rb") as stream:
                metadata: dcp.Metadata = _Unpickler(stream, file).load()
        except CheckpointError as error:
            self.refused = error
            raise
        metadata.storage_meta = metadata.storage_meta or dcp.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        # the folder where it was saved; Python 3.13 has the class in pathlib._local
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        raise CheckpointError(
            f"{self.file}: loading it would run code ({module}.{name}), which is refused; only "
            "checkpoints of glm-core train are read"
        )


def checksums(path: Path) -> dict[str, str]:
    """Returns the sha256 of every file of a checkpoint, as it was when it was saved."""
    sums: dict[str, str] = {}
    for table in sorted(path.glob(f"*{SUMS}")):
        sums |= json.loads(table.read_text(encoding="utf-8"))
    return sums


def file_sha256(path: Path) -> str:
    """Returns the checksum of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def single_process_allowed(single: bool) -> Iterator[None]:
    """Silences DCP's warning to a single process, where `single`."""
    if not single:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def list_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of every tensor in a checkpoint of many processes. Raises
    CheckpointError."""
    try:
        table = SafeReader(folder).read_metadata().state_dict_metadata
    except (OSError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder}: damaged, {METADATA} cannot be read ({error}); use another checkpoint of "
            "the run"
        ) from None
    tensors = {n: t for n, t in table.items() if isinstance(t, dcp.TensorStorageMetadata)}
    return {n: (tuple(t.size), t.properties.dtype) for n, t in tensors.items()}


def read_tensor(folder: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns one tensor of a checkpoint of many processes, put together from its shards. Raises
    CheckpointError where files are missing or damaged."""
    _verify(folder, (folder / METADATA).stat().st_mtime_ns)
    tensor = torch.empty(shape, dtype=dtype)
    with single_process_allowed(True):
        dcp_load({key: tensor}, storage_reader=SafeReader(folder), no_dist=True)
    return tensor


@functools.lru_cache(maxsize=8)
def _verify(folder: Path, changed_ns: int) -> None:
    """Compares all files with their checksums, once. Raises CheckpointError."""
    sums = checksums(folder)
    bad = [n for n in sums if not (folder / n).is_file() or file_sha256(folder / n) != sums[n]]
    if bad:
        raise CheckpointError(
            f"{folder}: damaged or missing: {', '.join(sorted(bad))}; use another checkpoint of "
            "the run"
        )
