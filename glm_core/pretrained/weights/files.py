"""The files of a checkpoint: finds them and lists their tensors by rank; values are read on
request.

Torch files are memory-mapped, and unmapped after MAPPED_BYTES were read, so memory holds little
more than one tensor. Nothing but tensors is unpickled."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pickle
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm_core.errors import CheckpointError
from glm_core.pretrained.weights import runs

WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|mp_rank_\d+_model_states\.pt"
)
"""names under which transformers, SAT and DeepSpeed save weights and their indexes"""
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
MAIN_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""the file that stands for a folder's whole model: the first one present, as in transformers"""
CONFIGS = ("config.json", "model_config.json")
LATEST = ("latest", "latest_checkpointed_iteration.txt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""dtypes by their names in safetensors"""
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
OTHER_FORMATS = {
    b"GGUF": "is llama.cpp's format GGUF, which is not read; give the model's safetensors or .bin",
    b"lmgg": "is a file of ggml (chatglm.cpp), which is not read; give the model's safetensors or "
    ".bin",
    b"ggml": "is a file of ggml (chatglm.cpp), which is not read; give the model's safetensors or "
    ".bin",
    b"\x89HDF": "is TensorFlow's HDF5, which is not read; give the model's safetensors or .bin",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file; fetch it: git lfs pull",
}
"""what files of other formats begin with, and what to do about them"""
MAPPED_BYTES = 1 << 28
"""bytes read from torch files before they are unmapped; mapped pages count as memory of the
process"""
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    _RECONSTRUCT,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
]
"""types that DeepSpeed and SAT save beside the weights (arguments, random states), safe to
unpickle"""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in one file, or in a folder that the processes of a run wrote together."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, where: tuple[slice, ...] = ()) -> Tensor:
        """Returns the values, or those that the slices select; memory-mapped where the format
        allows. Raises CheckpointError if the file has changed or is damaged."""
        if self.file.is_dir():
            return runs.read_sharded(self.file, self.key, self.shape, self.dtype)[where]
        if self.file.suffix == ".safetensors":
            with _safetensors(self.file) as file:
                runs.verify(self.file, self.file.stat().st_mtime_ns)
                stored = file.get_slice(self.key)
                shape = tuple(stored.get_shape())
                tensor: Tensor = stored[where] if where else file.get_tensor(self.key)
        else:
            tensor = _mapped.state(self.file, self.num_bytes)[self.key]
            shape, tensor = tensor.shape, tensor[where]
        if shape != self.shape or tensor.dtype != self.dtype:
            raise CheckpointError(f"{self.file}: {self.key} changed while it was read; read again")
        return tensor


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a checkpoint, values unread."""

    path: Path
    ranks: tuple[dict[str, StoredTensor], ...]
    """the tensors by key, for each tensor-parallel rank"""
    config: dict[str, Any]
    """content of config.json or model_config.json, or what a run's checkpoint says of its model;
    empty if there is none"""
    config_file: Path | None
    """where the config comes from"""
    home: Path
    """folder of the tokenizer"""
    leftovers: tuple[str, ...] = ()
    """weights in the same folder that are not read, such as those of an older save"""


def scan(path: str | Path) -> CheckpointFiles:
    """Finds and lists the files of a checkpoint: one file, a Hugging Face folder, a folder of
    shards `mp_rank_XX_model_states.pt` of SAT or DeepSpeed, or a training run. Raises
    CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give a checkpoint")
    inner = path if _main_file(path) else _iteration(runs.checkpoints_folder(path))
    if (run := runs.run_config(inner)) is not None:
        return CheckpointFiles(path, (_table([inner]),), run["model"], inner, runs.home(inner))
    ranks: tuple[dict[str, StoredTensor], ...]
    folders = [path if path.is_dir() else path.parent]
    leftovers: tuple[str, ...] = ()
    if inner.is_file():
        ranks = (_table([inner]),)
    else:
        folders.insert(0, inner)
        files = [_whole_files(inner)] if _main_file(inner) else _rank_files(inner)
        files = files or [_whole_files(inner)]
        ranks = tuple(map(_table, files))
        leftovers = _leftovers(inner, {f.name for rank in files for f in rank})
    config_file = next((f / c for f in folders for c in CONFIGS if (f / c).is_file()), None)
    config = read_json(config_file) if config_file else {}
    return CheckpointFiles(path, ranks, config, config_file, folders[-1], leftovers)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _iteration(path: Path) -> Path:
    """Returns what the file `latest` names: the folder of an iteration (SAT, DeepSpeed), or a file
    of a glm-core run. Without `latest` that is `path` itself."""
    for name in LATEST if path.is_dir() else ():
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or not (path / tag).exists():
                raise CheckpointError(
                    f"{path / name}: names {tag[:80]!r}, which is not beside it; correct it, "
                    "or give the folder that holds the shards"
                )
            return path / tag
    return path


def _rank_files(folder: Path) -> list[list[Path]]:
    """Returns the files of each rank, [] if the folder has no such shards."""
    by_rank = {int(m[1]): f for f in folder.iterdir() if (m := RANK_FILE.fullmatch(f.name))}
    if missing := sorted(set(range(max(by_rank, default=-1) + 1)) - by_rank.keys()):
        raise CheckpointError(
            f"{folder}: of {len(by_rank) + len(missing)} shards mp_rank_XX_model_states.pt these "
            f"are missing: {', '.join(f'{r:02d}' for r in missing)}; fetch them"
        )
    return [[by_rank[r]] for r in sorted(by_rank)]


def _main_file(folder: Path) -> Path | None:
    """Returns the file that stands for the whole model, None if the folder has none."""
    return next((folder / n for n in MAIN_FILES if (folder / n).is_file()), None)


def _leftovers(folder: Path, read: set[str]) -> tuple[str, ...]:
    """Returns the weights and indexes of a folder that are not read, and says so on stderr: they
    may be what its owner meant."""
    main = _main_file(folder)
    others = [f for f in folder.iterdir() if WEIGHTS.fullmatch(f.name) and f != main]
    names = tuple(sorted(f.name for f in others if f.name not in read))
    if names and main is not None:
        print(
            f"{folder}: reads {main.name}, as transformers does; not read: {some(names)} "
            "(remove what is old)",
            file=sys.stderr,
        )
    return names


def _whole_files(folder: Path) -> list[Path]:
    """Returns the files that together hold the whole model."""
    main = _main_file(folder)
    if main is not None:
        return _indexed(main) if main.suffix == ".json" else [main]
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise CheckpointError(
        f"{folder}: holds no checkpoint; expected one of {', '.join(MAIN_FILES)}, "
        "mp_rank_XX_model_states.pt, or a file `latest` that names a folder with these"
    )


def _indexed(index: Path) -> list[Path]:
    """Returns the files of an index. Each must exist and hold the tensors that the index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of file names; fetch it again")
    names = sorted(set(places.values()))
    if missing := [n for n in names if Path(n).name != n or not (index.parent / n).is_file()]:
        raise CheckpointError(
            f"{index}: names files that are not here: {some(missing)}; fetch them"
        )
    files = [index.parent / n for n in names]
    tensors = {f.name: _list_tensors(f) for f in files}
    if missing := [f"{k} in {name}" for k, name in places.items() if k not in tensors[name]]:
        raise CheckpointError(
            f"{index}: names tensors that its files do not hold: {some(missing)}; index and files "
            "belong to different checkpoints: fetch both again"
        )
    return files


def _table(files: list[Path]) -> dict[str, StoredTensor]:
    """Returns the tensors of several files, which together hold one model or one rank of it."""
    table: dict[str, StoredTensor] = {}
    for file in files:
        for key, stored in _list_tensors(file).items():
            if key in table:
                raise CheckpointError(
                    f"{file}: holds {key}, and so does {table[key].file}; the folder mixes two "
                    "checkpoints: remove one"
                )
            table[key] = stored
    return table


def _list_tensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, values unread."""
    if file.is_dir():
        return {k: StoredTensor(k, file, *facts) for k, facts in runs.sharded_tensors(file).items()}
    _require_known_format(file)
    if file.suffix != ".safetensors":
        return {
            k: StoredTensor(k, file, tuple(t.shape), t.dtype)
            for k, t in _mapped.state(file, 0).items()
        }
    tensors = {}
    with _safetensors(file) as handle:
        for key in handle.keys():  # noqa: SIM118  # not a dict
            view = handle.get_slice(key)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{file}: {key} is of dtype {view.get_dtype()}; known: {', '.join(DTYPES)}"
                )
            tensors[key] = StoredTensor(
                key, file, tuple(view.get_shape()), DTYPES[view.get_dtype()]
            )
    return tensors


def _require_known_format(file: Path) -> None:
    """Raises CheckpointError for a file that begins like one of OTHER_FORMATS."""
    try:
        with file.open("rb") as handle:
            begin = handle.read(max(map(len, OTHER_FORMATS)))
    except OSError as error:
        raise _unreadable(file, error) from None
    for magic, advice in OTHER_FORMATS.items():
        if begin.startswith(magic):
            raise CheckpointError(f"{file}: {advice}")


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


class _MappedStates:
    """A cache of the state dicts of mapped .bin and .pt files. Unpickling one takes a tenth of a
    second, and hundreds of tensors are read from it."""

    def __init__(self) -> None:
        self.states: dict[tuple[Path, int], dict[str, Tensor]] = {}
        self.touched_bytes = 0

    def state(self, file: Path, reading_bytes: int) -> dict[str, Tensor]:
        """Returns the file's tensors by key; the caller is about to read `reading_bytes` of
        them."""
        try:
            key = (file, file.stat().st_mtime_ns)
        except OSError as error:
            raise _unreadable(file, error) from None
        self.touched_bytes += reading_bytes
        if self.touched_bytes > MAPPED_BYTES:
            self.states.clear()
            self.touched_bytes = reading_bytes
        if key not in self.states:
            self.states[key] = _unpickled(file, key[1])
        return self.states[key]


_mapped = _MappedStates()


def _unpickled(file: Path, changed_ns: int) -> dict[str, Tensor]:
    """Returns the mapped state dict of a .bin or .pt file, or the one it holds as `module`."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if _is_zip(file):
                state = torch.load(file, "cpu", weights_only=True, mmap=True)
            else:
                state = _legacy(file, changed_ns)
    except pickle.UnpicklingError as error:
        raise _refused_code(file, error) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(file, error) from None
    if isinstance(state, dict) and isinstance(state.get("module"), dict):
        state = state["module"]
    if not isinstance(state, dict) or not state or not all(map(_is_tensor_entry, state.items())):
        raise CheckpointError(
            f"{file}: not a table of tensors by name; save model.state_dict() where it was written"
        )
    return state


def _is_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


@functools.lru_cache(maxsize=1)
def _legacy(file: Path, changed_ns: int) -> Any:
    """Returns the content of a file older than torch 1.6. It cannot be mapped: the last one read
    stays in memory."""
    return torch.load(file, "cpu", weights_only=True)


def _is_tensor_entry(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _refused_code(file: Path, error: Exception) -> CheckpointError:
    """Returns the error for a pickle that torch refused, with the name of the code in it."""
    named = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)", str(error))
    if not named:
        return _unreadable(file, error)
    return CheckpointError(
        f"{file}: loading it would run code ({named[1] or named[2]}), which is refused; save "
        "model.state_dict() alone, best as safetensors, where you trust the file"
    )


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    kind = "safetensors" if file.suffix == ".safetensors" else "a torch checkpoint"
    fact = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"{file}: truncated or not {kind} ({fact}); fetch it again")


def some(items: Iterable[str], most: int = 4) -> str:
    """Returns the first items as text, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def safetensors_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """Returns the header of a safetensors file whose tensors follow in this order without gaps."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, dtype, shape in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
