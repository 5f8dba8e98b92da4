"""What the trainer asks of checkpoints, and the checkpoints of one process: each a safetensors file
that is complete and verified, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm_core.config import RunConfig, dumps, to_dict
from glm_core.errors import CheckpointError, ConfigError

FORMAT = "glm-core checkpoint 1"
PATTERN = "step-*.safetensors"
FOLDER, LATEST, PART = "checkpoints", "latest", ".part"
TOKENIZER = "tokenizer.model"
"""file in a run's folder: what its ids mean, for those who use its model"""
FREE = {
    "train.backend",
    "train.strict",
    "train.exact",
    "train.compile",
    "train.graph",
    "train.offload_optimizer",
    "train.save_every",
    "train.keep",
    "data.path",
    "data.text_key",
    "policy.nonfinite",
    "policy.spike",
    "policy.spike_sigma",
    "policy.spike_window",
    "policy.limit",
}
"""keys that may differ on resume: where the run computes and stores, and what it does about bad
steps, not what it computes. The text itself is identified by its hash, in the sampler's state."""


class Saved(Protocol):
    """One checkpoint, opened."""

    @property
    def path(self) -> Path: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    def fill(self, tensors: dict[str, Any]) -> None:
        """Loads the tensors, by name, in place. Raises CheckpointError where they do not fit."""


class Checkpoints(Protocol):
    """The checkpoints of one run."""

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Writes a checkpoint, or begins to, and returns where it is. Raises CheckpointError."""

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""

    def open(self, path: Path) -> Saved:
        """Opens a checkpoint. Raises CheckpointError for what is none, or damaged."""

    def wait(self) -> object:
        """Returns when nothing is being written. Raises CheckpointError where writing failed."""


class SavedFile(NamedTuple):
    """A checkpoint of one process, read and verified."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def fill(self, tensors: dict[str, Any]) -> None:
        """Copies the tensors into those given by name. Raises CheckpointError unless names and
        shapes are the same."""
        require_fit(self.tensors, tensors, self.path)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.tensors[name])


class FileCheckpoints(NamedTuple):
    """The checkpoints of a run on one process, `step-N.safetensors` in a folder."""

    folder: Path
    keep: int
    """the newest so many stay"""

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Writes a checkpoint and removes the oldest; the module's function `save` says how."""
        return save(self.folder, step, tensors, facts, self.keep)

    def latest(self) -> Path | None:
        """Returns the newest checkpoint, None where there is none yet."""
        return latest(self.folder)

    def open(self, path: Path) -> SavedFile:
        """Reads and verifies a checkpoint. Raises CheckpointError."""
        return open_checkpoint(path)

    def wait(self) -> None:
        """Every save is complete when it returns."""


def open_checkpoint(path: Path) -> SavedFile:
    """Reads and verifies the checkpoint meant by `path`; see `find` and `load`."""
    path = find(path)
    tensors, facts = load(path)
    return SavedFile(path, facts, tensors)


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int
) -> Path:
    """Writes `step-N.safetensors` (facts as JSON in its header), points `latest` at it, and removes
    all but the newest `keep`. Killed at any moment, it leaves the older checkpoints and a `latest`
    that names a whole one. Raises CheckpointError where the disk is full or not writable."""
    text = json.dumps(facts)
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"format": FORMAT, "facts": text, "sha256": digest(kept, text)}
    path = folder / f"step-{step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, lambda part: save_file(kept, part, header))
        replace(folder / LATEST, lambda part: part.write_text(path.name + "\n", encoding="utf-8"))
        for old in sorted(folder.glob(PATTERN))[:-keep]:
            if old != path:
                old.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not saved ({error}); checkpoints before it are intact: make room or choose "
            "another folder, then resume"
        ) from None
    return path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, flushes the file to the disk and renames it to `path`: all of it
    appears or nothing. What a kill or an error left of an earlier attempt is removed."""
    # a folder: safetensors writes to a temporary of its own beside the file it is given
    scratch = path.parent / PART
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        write(scratch / path.name)
        # safetensors' temporaries are for their owner alone; the folder's mode follows the umask
        (scratch / path.name).chmod(scratch.stat().st_mode & 0o666)
        flush(scratch / path.name)
        (scratch / path.name).replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    flush(path.parent)  # the rename itself


def describe(out: Path, config: RunConfig, sampler: object) -> None:
    """Writes the run's resolved config and its sampler's tokenizer into its folder."""
    replace(out / "config.toml", lambda part: part.write_text(dumps(config), encoding="utf-8"))
    if tokenizer := getattr(sampler, "tokenizer", None):
        replace(out / TOKENIZER, lambda part: part.write_bytes(tokenizer.model))


def flush(path: Path) -> None:
    """Returns when the file or folder is on the disk. Windows opens no folders, and flushes only
    what is open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Returns the sha256 over the facts and every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        total.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def find(path: Path) -> Path:
    """Returns the checkpoint meant: the file itself, or the one that `latest` names in a folder of
    checkpoints or of a run. Raises CheckpointError where there is none."""
    if (path / FOLDER).is_dir():
        path = path / FOLDER
    if path.is_dir():
        try:
            path = path / (path / LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: holds no checkpoint; {_others(path)}") from None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; {_others(path)}")
    return path


def latest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of a folder, None where there is none yet."""
    return find(folder) if (folder / LATEST).exists() else None


def starting_point(
    out: Path,
    resume: bool | str | Path,
    newest: Callable[[Path], Path | None] = latest,
    begin: bool = False,
) -> Path | None:
    """Returns the checkpoint to go on from, None for a start from step 0. newest: finds the newest
    checkpoint of a folder. begin: where there is no run to resume, one begins. Raises ConfigError
    rather than write over another run."""
    begun, folder = (out / "config.toml").exists(), out / FOLDER
    if resume is False:
        if begun or folder.exists():
            raise ConfigError(f"{out}: holds a run already; resume it or choose another folder")
        return None
    if resume is not True:
        return find(Path(resume))
    if (found := newest(folder)) is not None or not (begun or begin):
        return found or find(folder)
    if begun:
        print(f"{out}: stopped before its first checkpoint; starts at step 0", file=sys.stderr)
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and facts as they were saved, verified by checksum. Raises CheckpointError
    for a file that is missing, truncated, damaged or something else."""
    path = find(path)
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({error}); {_others(path)}"
        ) from None
    if header.get("format") != FORMAT:
        found = header.get("format", "a safetensors file without format")
        raise CheckpointError(
            f"{path}: not a checkpoint of a run: expected {FORMAT!r}, found {found!r}; "
            + _others(path)
        )
    if digest(tensors, header.get("facts", "")) != header.get("sha256"):
        raise CheckpointError(f"{path}: damaged, its checksum does not match; {_others(path)}")
    return tensors, json.loads(header["facts"])


def _others(path: Path) -> str:
    """Says what to do instead: use another checkpoint of the folder."""
    folder = path if path.is_dir() else path.parent
    others = [str(p) for p in sorted(folder.glob(PATTERN)) if p != path]
    if others:
        return f"use one of: {', '.join(others)}"
    return "give the folder of a run that has one; a run that has none starts without resume"


def require_same(saved: dict[str, Any], config: RunConfig, path: Path) -> None:
    """Raises CheckpointError naming every key whose change would make this another run. A key that
    was not saved is younger than the checkpoint and had its default's meaning."""
    before, now = _flat(to_dict(RunConfig())) | _flat(saved), _flat(to_dict(config))
    changed = [
        f"{key}={before.get(key, 'absent')} (now {now.get(key, 'absent')})"
        for key in sorted(before.keys() | now.keys())
        if key not in FREE and before.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: saved by another run: {', '.join(changed)}; resume with the config.toml "
            "beside it, or start a new run in another folder"
        )


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    return {f"{t}.{key}": value for t, table in tables.items() for key, value in table.items()}


def require_fit(tensors: dict[str, Tensor], mine: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless names and shapes are the same as in `mine`."""
    odd = sorted(
        name
        for name in tensors.keys() | mine.keys()
        if name not in tensors or name not in mine or tensors[name].shape != mine[name].shape
    )
    if odd:
        some = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise CheckpointError(
            f"{path}: does not fit this model: {some} missing, unexpected or of another shape; "
            "resume with the version that saved it"
        )
