"""Saves and loads the checkpoints of a run on many ranks. They are written in the background, are
complete or absent, and can be loaded under any other plan.

`step-N/` holds the files of torch.distributed.checkpoint (DCP: `*.distcp`, `.metadata`), their
sha256 and `facts.json`; `latest` names the newest. Names and shapes are those of the model on one
process (glm_core.distributed.layout), so a rank of any plan finds its shards. All hosts must see
the folder. `.metadata` is a pickle, of which only the description of tensors is read
(glm_core.distributed.dcp_reader)."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from glm_core.distributed.dcp_reader import (
    FACTS,
    SUMS,
    SafeReader,
    checksums,
    file_sha256,
    single_process_allowed,
)
from glm_core.distributed.layout import Splits, chunks
from glm_core.distributed.mesh import connecting
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST, flush, replace

# torch's own writer, up to torch 2.10; its threads are no place for a filter of their own
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)

FORMAT = "glm-core distributed checkpoint 1"
PART = ".part"
PATTERN = "step-" + "[0-9]" * 8


class Shards:
    """This rank's shards of a tensor: views, each by its offsets in the whole tensor."""

    def __init__(self, shape: torch.Size, shards: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self.shape = shape
        self.shards = {torch.Size(place): view for place, view in shards if view.numel()}

    def size(self) -> torch.Size:
        """Returns the shape of the whole tensor, which DCP checks on loading."""
        return self.shape

    def snapshot(self) -> Shards:
        """Returns a copy in host memory."""
        copies = [(p, v.detach().to("cpu", copy=True)) for p, v in self.shards.items()]
        return Shards(self.shape, [(tuple(place), view) for place, view in copies])

    # DCP's protocol for foreign types
    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, place),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=place, sizes=view.shape),
                    properties=TensorProperties.create_from_tensor(view),
                    size=self.shape,
                ),
            )
            for place, view in self.shards.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=p, sizes=v.shape) for p, v in self.shards.items()]


State = Mapping[str, Tensor | Shards]
"""by name; DTensors, and tensors that every rank holds whole, are converted to Shards here"""


def shards_of(tensor: Tensor, splits: Splits = (), own: Tensor | None = None) -> Shards:
    """Returns this rank's shards of a tensor. `tensor` is this rank's part, which `splits` place in
    the whole; it is a DTensor where data-parallel ranks share its rows. `own`, where given, holds
    the values instead: this rank's part of a tensor with the same layout, for example of its
    moments."""
    shape, place = list(tensor.shape), (0,) * tensor.ndim
    local = tensor if own is None else own
    if isinstance(tensor, DTensor):
        local = tensor.to_local() if own is None else own
        _, place = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    if not splits:
        return Shards(torch.Size(shape), [(place, local.detach())])
    assert not any(place[1:]), "with other splits ZeRO shards rows"
    for split in splits:
        shape[split.dim] *= split.ranks
    return Shards(torch.Size(shape), chunks(local.detach(), splits, place[0]))


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].shards[index.offset]


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # not DCP's own method: it copies what is neither tensor nor container
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        view: Tensor = self.state_dict[index.fqn].shards[index.offset]
        return view


class _Writer(FileSystemWriter):
    """Writes files into `step-N.part`. When every rank has written, the coordinator renames it, as
    the last thing."""

    def __init__(self, target: Path, facts: str, keep: int) -> None:
        super().__init__(target.with_name(target.name + PART), sync_files=True)
        self.target, self.facts, self.keep = target, facts, keep

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the coordinator alone makes the folder: it may have to remove another first

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for left in self.target.parent.glob(f"*{PART}"):  # by an attempt that was killed
            shutil.rmtree(left)
        Path(self.path).mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            done = super().write_data(plan, planner)
        except Exception as error:
            raise root_cause(error) from None
        prefix, folder = plan.storage_data.prefix, Path(self.path)
        sums = {path.name: file_sha256(path) for path in folder.glob(f"{prefix}*.distcp")}
        if sums:
            (folder / f"{prefix}{SUMS}").write_text(json.dumps(sums), encoding="utf-8")
            flush(folder / f"{prefix}{SUMS}")
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        part = Path(self.path)
        (part / FACTS).write_text(self.facts, encoding="utf-8")
        flush(part / FACTS)
        flush(part)
        if self.target.exists():  # after a roll-back this step is saved again
            self.target.rename(self.target.with_name(self.target.name + ".old" + PART))
        part.rename(self.target)
        flush(self.target.parent)
        replace(
            self.target.parent / LATEST,
            lambda p: p.write_text(self.target.name + "\n", encoding="utf-8"),
        )
        others = [p for p in complete_checkpoints(self.target.parent) if p != self.target]
        for old in others[: 1 - self.keep or None]:
            shutil.rmtree(old)


def root_cause(error: BaseException) -> BaseException:
    """Returns the system's error behind one of torch.save, such as `unexpected pos 704 vs 598`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob(PATTERN) if (p / FACTS).is_file())


def find_checkpoint(path: Path) -> Path:
    """Returns `path` where it is a checkpoint, else the one that `latest` names in this folder of
    checkpoints, else the newest there. Raises CheckpointError where there is none."""
    if (path / FACTS).is_file():
        return path
    complete = complete_checkpoints(path)
    if not complete:
        raise CheckpointError(f"{path}: holds no distributed checkpoint; start without resume")
    named = (
        path / (path / LATEST).read_text(encoding="utf-8").strip()
        if (path / LATEST).is_file()
        else complete[-1]
    )
    return named if named in complete else complete[-1]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint of a folder, None where there is none."""
    return find_checkpoint(folder) if complete_checkpoints(folder) else None


class Checkpoints:
    """One run's folder of checkpoints. Every rank constructs it and calls its methods, in the same
    order."""

    def __init__(self, folder: Path, keep: int = 2, timeout_s: float = 600.0) -> None:
        """`keep` is how many checkpoints stay; `timeout_s` how long ranks wait for each other while
        they save."""
        self.folder, self.keep = folder, keep
        self.group = None
        if dist.is_initialized():
            # its own group on the host: saving runs at the same time as training's collectives
            with connecting():
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._target: Path | None = None

    def save(self, step: int, state: State, facts: dict[str, Any]) -> Path:
        """Copies the state to host memory, writes `step-N` in the background and returns the path
        where it will be. `facts` must be JSON-able; those of rank 0 are written. A kill at any
        moment leaves the older checkpoints and a `latest` that names a complete one. Raises
        CheckpointError where the previous save failed on any rank."""
        self.wait()
        copies = {name: _as_shards(value).snapshot() for name, value in state.items()}
        target = self.folder / f"step-{step:08d}"
        text = json.dumps({"format": FORMAT, "step": step, **facts})
        self._target = target
        # no daemon: a process that ends normally finishes writing first
        self._thread = threading.Thread(
            target=self._write, args=(target, copies, text), name=f"checkpoint of step {step}"
        )
        self._thread.start()
        return target

    def _write(self, target: Path, state: dict[str, Shards], facts: str) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            writer = _Writer(target, facts, self.keep)
            with single_process_allowed(self.group is None):
                dcp_save(
                    dict(state),
                    storage_writer=writer,
                    process_group=self.group,
                    planner=_SavePlanner(flatten_state_dict=False),
                    no_dist=self.group is None,
                )
        except BaseException as error:  # as CheckpointException is; `wait` raises it
            self._error = error

    def wait(self) -> Path | None:
        """Waits until nothing is being written and returns the newest checkpoint of this object.
        Raises CheckpointError that names the rank where writing failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"{self._target}: not saved ({failure_text(error)}); checkpoints before it are "
                "intact: make room or choose another folder, then resume"
            ) from None
        return self._target

    def latest(self) -> Path | None:
        """Returns the newest checkpoint once nothing is being written, None where there is none."""
        self.wait()
        return newest_checkpoint(self.folder)

    def open(self, path: Path) -> SavedFolder:
        """Reads a checkpoint's facts, so that its tensors can be loaded. Raises CheckpointError."""
        path = find_checkpoint(path)
        return SavedFolder(self, path, read_facts(path))

    def load(self, path: Path, state: State) -> dict[str, Any]:
        """Fills the state's tensors in place, whatever plan the checkpoint was saved under, and
        returns the facts. Raises CheckpointError where files are damaged or missing, or where the
        model is another one."""
        path = find_checkpoint(path)
        facts = read_facts(path)
        self._verify(path)
        wanted = {name: _as_shards(value) for name, value in state.items()}
        reader = SafeReader(path)
        try:
            with single_process_allowed(self.group is None):
                dcp_load(
                    wanted,
                    storage_reader=reader,
                    process_group=self.group,
                    planner=_LoadPlanner(flatten_state_dict=False),
                    no_dist=self.group is None,
                )
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
            for failure in (reader.refused, *failures):
                if isinstance(failure, CheckpointError):
                    raise failure from None
            raise CheckpointError(
                f"{path}: does not fit this model ({failure_text(error)}); resume with the config "
                "it was saved with"
            ) from None
        return facts

    def _verify(self, path: Path) -> None:
        """Checks the sha256 of all files, of which each rank reads a share. All ranks raise
        CheckpointError where any file differs."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if self.group else (0, 1)
        sums = checksums(path)
        mine = sorted(sums)[rank::world]
        bad = [n for n in mine if not (path / n).is_file() or file_sha256(path / n) != sums[n]]
        everyone = [bad]
        if self.group is not None:
            everyone = [[] for _ in range(world)]
            dist.all_gather_object(everyone, bad, group=self.group)
        if damaged := sorted(name for names in everyone for name in names):
            others = [str(p) for p in complete_checkpoints(path.parent) if p != path]
            instead = f"use {' or '.join(others)}" if others else "start again without resume"
            raise CheckpointError(f"{path}: damaged or missing: {', '.join(damaged)}; {instead}")


class SavedFolder(NamedTuple):
    """One checkpoint, whose facts are read."""

    checkpoints: Checkpoints
    path: Path
    facts: dict[str, Any]

    def fill(self, tensors: dict[str, Any]) -> None:
        """Loads the tensors in place; see `Checkpoints.load`."""
        self.checkpoints.load(self.path, tensors)


def _as_shards(value: Tensor | Shards) -> Shards:
    return value if isinstance(value, Shards) else shards_of(value)


def read_facts(path: Path) -> dict[str, Any]:
    """Reads the facts that were saved with the tensors. Raises CheckpointError where the folder is
    not a checkpoint of ours."""
    try:
        facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a distributed checkpoint ({error})") from None
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected {FORMAT!r}, found {facts.get('format')!r}")
    return facts


def failure_text(error: BaseException) -> str:
    """Returns one line on an error. Where DCP collected it from ranks, the line names them:
    `rank 1: [Errno 28] No space left on device`."""
    if isinstance(error, CheckpointException):
        each = [f"rank {rank}: {e}" for rank, (e, _) in sorted(error.failures.items())]
        return " ".join("; ".join(each).split())
    return " ".join(f"{type(error).__name__}: {error}".split())
