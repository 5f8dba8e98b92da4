"""Reads a distributed checkpoint without running code that its files name."""

from __future__ import annotations

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from glm_core.errors import CheckpointError

METADATA = ".metadata"
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
