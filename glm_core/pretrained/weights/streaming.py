"""Reads whole layers of a checkpoint into memory that is there already, again and again, in large
pieces; for models larger than memory (model/offload.py)."""

from __future__ import annotations

import itertools
import json
import os
import time
import weakref
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glm_core.errors import CheckpointError
from glm_core.model.glm import GLM
from glm_core.model.offload import Fetch, duplicate, page_lock, staged, stream, tensors
from glm_core.pretrained.weights.files import StoredTensor
from glm_core.pretrained.weights.reading import Checkpoint

PIECE_BYTES = 8 << 20
"""bytes of one read"""
PROBE_BYTES = 256 << 20
"""bytes read to measure a disk"""


class _File(NamedTuple):
    """A file that stays open."""

    handle: FileIO
    version: tuple[int, int]
    """time of its last change and its size, when it was opened"""
    offsets: dict[str, int]
    """where each tensor begins"""


class LayerFiles:
    """The layers of a checkpoint as they lie in its files. Raises CheckpointError for a checkpoint
    whose layers cannot be read without rearranging."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = {s.file for rank in checkpoint.files.ranks for s in rank.values()}
        heads = checkpoint.layout.qkv == "heads"
        foreign = sorted(f.name for f in files if f.suffix != ".safetensors")
        if checkpoint.num_ranks > 1 or heads or foreign:
            fact = (
                f"{checkpoint.num_ranks} tensor-parallel ranks"
                if checkpoint.num_ranks > 1
                else f"{foreign[0]} is no safetensors file"
                if foreign
                else f"layout {checkpoint.layout.name} mixes the rows of q, k and v"
            )
            raise CheckpointError(
                f"{checkpoint.files.path}: its layers cannot be read piece by piece ({fact}); "
                "glm-core checkpoint convert --to glm-core writes it so that they can"
            )
        self.checkpoint = checkpoint
        self._files = {file: _open(file) for file in files}
        weakref.finalize(self, _close, [f.handle for f in self._files.values()])
        self._piece = torch.empty(PIECE_BYTES, dtype=torch.uint8)

    def stored(self, layer: int) -> dict[str, list[StoredTensor]]:
        """Returns what is stored for each tensor of a layer, by its name in the block."""
        c, prefix = self.checkpoint, f"blocks.{layer}."
        table = {}
        for name in (n for n in c.shapes if n.startswith(prefix)):
            leaf = name.removeprefix(prefix)
            table[leaf] = c.stored(name)
            if c.quantized(name):
                table[leaf.removesuffix("weight") + "scale"] = c.stored(name, scale=True)
        return table

    def num_bytes(self, layers: Iterable[int]) -> int:
        """Returns the stored bytes of these layers."""
        parts = [p for i in layers for parts in self.stored(i).values() for p in parts]
        return sum(p.num_bytes for p in parts)

    def fetch(self, layer: int, block: nn.Module) -> None:
        """Reads a layer into the tensors of `block`, converted to their dtypes. Raises
        CheckpointError for a file that was changed or ends early, and where the disk fails."""
        stored = self.stored(layer)
        for name, tensor in tensors(block).items():
            values, begin = tensor.detach().view(-1), 0
            for part in stored[name]:
                size = part.num_bytes // part.dtype.itemsize
                self._read(part, values[begin : begin + size])
                begin += size

    def gb_s(self, layers: Sequence[int], dtype: torch.dtype, *, cached: bool = False) -> float:
        """Measures how fast `fetch` reads these layers and converts them to `dtype`, by about
        PROBE_BYTES of the last ones: from disk, or from the pages that the system has cached."""
        stored = [p for i in reversed(layers) for x in self.stored(i).values() for p in x]
        total = itertools.accumulate(p.num_bytes for p in stored)
        parts = [p for p, end in zip(stored, total, strict=True) if end - p.num_bytes < PROBE_BYTES]
        longest = max(p.num_bytes // p.dtype.itemsize for p in parts)
        memory, seconds = torch.ones(longest * max(dtype.itemsize, 4), dtype=torch.uint8), 0.0
        for part in parts:
            kind = dtype if part.dtype.is_floating_point else part.dtype
            values = memory.view(kind)[: part.num_bytes // part.dtype.itemsize]
            if cached:
                self._read(part, values)
            else:
                self._drop(part)
            start = time.perf_counter()
            self._read(part, values)
            seconds += time.perf_counter() - start
        return sum(p.num_bytes for p in parts) / max(seconds, 1e-9) / 1e9

    def _drop(self, part: StoredTensor) -> None:
        """Makes the system forget the cached pages of a tensor, those too that a file just written
        still has to bring to the disk."""
        file = self._files[part.file]
        if hasattr(os, "posix_fadvise"):
            descriptor, begin = file.handle.fileno(), file.offsets[part.key]
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, begin, part.num_bytes, os.POSIX_FADV_DONTNEED)

    def _read(self, part: StoredTensor, values: Tensor) -> None:
        """Reads one stored tensor into flat `values`."""
        file = self._files[part.file]
        if _stamp(file.handle, part.file) != file.version:
            raise CheckpointError(
                f"{part.file}: was changed while the model runs from it; start again"
            )
        offset = file.offsets[part.key]
        if part.dtype == values.dtype:
            _read_into(file.handle, part, offset, values.view(torch.uint8))
            return
        step = PIECE_BYTES // part.dtype.itemsize
        for begin in range(0, len(values), step):
            target = values[begin : begin + step]
            piece = self._piece[: len(target) * part.dtype.itemsize]
            _read_into(file.handle, part, offset + begin * part.dtype.itemsize, piece)
            target.copy_(piece.view(part.dtype))


def _open(file: Path) -> _File:
    try:
        handle = FileIO(file)
        version = _stamp(handle, file)
        length = int.from_bytes(handle.read(8), "little")
        table = json.loads(handle.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); fetch it again") from None
    offsets = {k: 8 + length + v["data_offsets"][0] for k, v in table.items() if k[:2] != "__"}
    return _File(handle, version, offsets)


def _close(handles: list[FileIO]) -> None:
    for handle in handles:
        handle.close()


def _stamp(handle: FileIO, file: Path) -> tuple[int, int]:
    try:
        facts = os.fstat(handle.fileno())
    except OSError as error:
        raise CheckpointError(f"{file}: not readable ({error}); start again") from None
    return facts.st_mtime_ns, facts.st_size


def _read_into(handle: FileIO, part: StoredTensor, offset: int, target: Tensor) -> None:
    """Fills `target`, bytes, from the file."""
    memory, done = memoryview(target.numpy().data), 0
    try:
        handle.seek(offset)
        while done < len(memory):
            count = handle.readinto(memory[done : done + PIECE_BYTES])
            if not count:
                raise OSError(f"ends at byte {offset + done}")
            done += count
    except OSError as error:
        raise CheckpointError(
            f"{part.file}: {part.key} could not be read ({error}); check the disk, or fetch the "
            "file again"
        ) from None


def load_streamed(
    files: LayerFiles,
    dtype: torch.dtype,
    device: torch.device,
    layers: Sequence[int],
    num_buffers: int,
) -> GLM:
    """Returns the model on the device, in `dtype`; these layers are read from the files whenever
    they compute. Quantized linears stay quantized."""
    model = files.checkpoint.load(dtype, device, quantized=True, without=layers[num_buffers:])
    buffers = [model.blocks[i] for i in layers[:num_buffers]]
    fetch: Fetch = files.fetch
    if device.type != "cpu":
        fetch = staged(fetch, page_lock(duplicate(buffers[0], torch.device("cpu")), device))
    stream(model, layers, buffers, fetch)
    return model
