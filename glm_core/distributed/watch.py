"""Records on the disk where every rank is, so that a surviving rank can name the rank that hangs or
is gone, with its op and its stack.

The records lie in one folder of the run, which all hosts must see. A thread samples the stack of
the training thread once in an interval, so a step costs nothing more."""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch.distributed as dist

from glm_core import dispatch, environment
from glm_core.diagnose import watchdog
from glm_core.errors import TrainingError
from glm_core.versions import co_qualname

RECORD_BYTES = 16384
"""size of a record, allocated at the start: a full disk cannot stop it"""
FRAMES = 24
"""innermost frames kept of a stack"""
_WAITING = ("distributed_c10d.py", "_functional_collectives.py")
"""files of torch whose functions wait for other ranks"""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The place where a thread is."""

    what: str
    """`op geglu`, `all_reduce`, or the innermost function"""
    waiting: bool
    """whether it waits for other ranks"""
    stack: list[str]
    """`file:line function`, outermost first"""


def place_of(frame: FrameType | None) -> Place:
    """Reads a thread's place from its frames, the innermost first."""
    if frame is None:
        return Place("nothing: its thread has ended", False, [])
    op, collective, stack = "", "", []
    innermost, walk = frame, frame
    while walk is not None:
        name = Path(walk.f_code.co_filename).name
        stack.append(f"{walk.f_code.co_filename}:{walk.f_lineno} {co_qualname(walk.f_code)}")
        if walk.f_code is dispatch.run.__code__ and not op:
            op = f"op {walk.f_locals['op'].name}"
        if name in _WAITING and "wrapper" not in walk.f_code.co_name:
            collective = walk.f_code.co_name
        walk = walk.f_back  # type: ignore[assignment]  # ends the loop
    line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    if not collective and ".wait(" in line:
        collective = co_qualname(innermost.f_code)
    inside = f"{op}, {collective}" if op and collective else collective or op
    return Place(inside or co_qualname(innermost.f_code), bool(collective), stack[:FRAMES][::-1])


class Record:
    """One rank's file, which that rank alone writes."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.json"
        self.file = self.path.open("wb", buffering=0)
        self.file.write(b" " * RECORD_BYTES)

    def write(self, values: dict[str, Any]) -> None:
        """Overwrites the record in place. A stack that is too long loses its outermost frames."""
        data = json.dumps(values).encode()
        while len(data) > RECORD_BYTES and values["stack"]:
            values = {**values, "stack": values["stack"][1:]}
            data = json.dumps(values).encode()
        self.file.seek(0)
        self.file.write(data.ljust(RECORD_BYTES))

    def close(self) -> None:
        """Closes the file and leaves it: it says where the rank was last."""
        self.file.close()


def read(path: Path) -> dict[str, Any] | None:
    """Reads a record; None where there is none or it is just being written."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None
    return values


class RankWatch:
    """Records this rank and reads the records of the others."""

    def __init__(self, folder: Path, rank: int, world: int, interval_s: float = 1.0) -> None:
        self.folder, self.rank, self.world, self.interval_s = folder, rank, world, interval_s
        self.record = Record(folder, rank)
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        if launched := environment.watch():  # the launcher looks here when a process has died
            (launched / f"rank-{rank}").write_text(
                str(self.record.path.resolve()), encoding="utf-8"
            )

    def note(self, state: str = "running") -> dict[str, Any]:
        """Writes where the training thread is now, and returns it."""
        place = place_of(sys._current_frames().get(self.thread))
        values = {
            "rank": self.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "state": state,
            "time": time.time(),
            "begun": watchdog.begun(),
            "collectives": collective_counts(),
            **dataclasses.asdict(place),
        }
        with self._lock:
            self.record.write(values)
        return values

    def sample(self, done: threading.Event) -> None:
        """Writes a note every interval until `done` is set."""
        while not done.wait(self.interval_s):
            self.note()

    @property
    def grace_s(self) -> float:
        """Seconds that a rank which ends waits for the notes of the others."""
        return 3 * self.interval_s

    def on_hang(self) -> str:
        """Returns this rank's stack and the rank that holds up the job, for `watchdog.guard`."""
        mine = self.note("hung")
        time.sleep(self.grace_s)
        return f"{stack_text(mine)}\nglm-core: {self.verdict()}\nglm-core: "

    def records(self) -> dict[int, dict[str, Any] | None]:
        """Reads the record of every rank."""
        return {r: read(self.folder / f"rank-{r}.json") for r in range(self.world)}

    def verdict(self) -> str:
        """Names the ranks that hold up the job: those that no longer answer; else those that do not
        wait for others; else those that are behind the others in a group's collectives."""
        records = self.records()
        if silent := {r: x for r, x in records.items() if silent_s(x) > self.grace_s}:
            return "; ".join(f"{lost_text(r, x)}{self._stuck(r)}" for r, x in silent.items())
        known = {r: x for r, x in records.items() if x is not None and x["state"] != "ended"}
        busy = {r: x for r, x in known.items() if not x["waiting"]}
        late = {r: x for r, x in known.items() if is_behind(x, list(known.values()))}
        blocking = busy or late
        if not blocking:
            return f"all {self.world} ranks wait for each other: " + "; ".join(
                f"rank {r} in {x['what']}" for r, x in known.items()
            )
        waiting = sorted(known.keys() - blocking.keys())
        others = f"; rank {', '.join(map(str, waiting))} waits" if waiting else ""
        return (
            "; ".join(
                f"rank {r} of {self.world} holds up the job: {x['begun']}, inside {x['what']}"
                + stack_text(x)
                for r, x in blocking.items()
            )
            + others
        )

    def _stuck(self, rank: int) -> str:
        """Returns the stack that faulthandler wrote for a rank whose interpreter is blocked."""
        path = stuck_path(self.folder, rank)
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        return "\n" + text if text else ""

    def explain(self, error: Exception) -> TrainingError:
        """Explains a collective that failed here, mostly because another rank is gone: the error
        names that rank and where it was last."""
        place = place_of_error(error)
        begun = watchdog.begun()
        time.sleep(self.grace_s)  # until a rank that died counts as silent
        records = self.records()
        lost = [
            lost_text(r, x)
            for r, x in records.items()
            if r != self.rank and is_gone(x, self.grace_s)
        ]
        words = " ".join(str(error).split())[:200]
        cause = "; ".join(lost) or "every rank still answers"
        return TrainingError(
            f"rank {self.rank} of {self.world}: {begun}, {place}: {words}; {cause}; resume from "
            "the last checkpoint"
        )

    def close(self, state: str) -> None:
        """Writes the last note: `state` says why no more will come."""
        self.note(state)
        self.record.close()


def collective_counts() -> dict[str, int]:
    """Returns how many collectives this rank has begun, by group."""
    if not dist.is_initialized():
        return {}
    counts: dict[str, int] = {}
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            counts[group.group_name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # torch's stub lacks it
        except RuntimeError:  # a library that does not count
            continue
    return counts


def is_behind(record: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Returns whether another rank has begun more collectives in a group of both."""
    return any(
        other["collectives"].get(group, 0) > count
        for other in records
        for group, count in record["collectives"].items()
    )


def silent_s(record: dict[str, Any] | None) -> float:
    """Returns the seconds since a rank's last note; 0 where it ended normally."""
    if record is None:
        return float("inf")
    return 0.0 if record["state"] == "ended" else time.time() - record["time"]


def is_gone(record: dict[str, Any] | None, grace_s: float) -> bool:
    """Returns whether a rank is silent, has reported a failure, or its process on this host is
    dead."""
    if record is None or silent_s(record) > grace_s or record["state"] == "failed":
        return True
    if record["host"] != socket.gethostname() or record["state"] == "ended":
        return False
    try:
        status = Path(f"/proc/{record['pid']}/stat").read_text(encoding="utf-8")
    except OSError:
        return sys.platform == "linux"
    return status.rpartition(")")[2].split()[0] == "Z"


def lost_text(rank: int, record: dict[str, Any] | None) -> str:
    """Describes a lost rank: `rank 1 (pid 7 on a) is gone; last seen in step 3, inside op geglu`,
    then its stack."""
    if record is None:
        return f"rank {rank} never began"
    who = f"rank {rank} (pid {record['pid']} on {record['host']})"
    state = "failed" if record["state"] == "failed" else "is gone or does not answer"
    return f"{who} {state}; last seen in {record['begun']}, inside {record['what']}" + stack_text(
        record
    )


def stack_text(record: dict[str, Any]) -> str:
    """Returns the stack as lines, outermost first."""
    return "".join(f"\n  rank {record['rank']}: {line}" for line in record["stack"])


def place_of_error(error: BaseException) -> str:
    """Returns the innermost op or collective that a traceback went through."""
    trace, what = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code is dispatch.run.__code__:
            what = f"op {trace.tb_frame.f_locals['op'].name}"
        elif Path(code.co_filename).name in _WAITING and "wrapper" not in code.co_name:
            what = code.co_name
        trace = trace.tb_next
    return f"inside {what}" if what else "outside ops"


def stuck_path(folder: Path, rank: int) -> Path:
    """Returns the file that faulthandler writes where a rank's interpreter is blocked."""
    return folder / f"rank-{rank}.stuck"


def _stuck_file(folder: Path, rank: int) -> TextIO:
    return stuck_path(folder, rank).open("w", encoding="utf-8")


@contextmanager
def watched(
    folder: Path, rank: int, world: int, timeout_s: float, interval_s: float = 1.0
) -> Iterator[RankWatch]:
    """Watches the block. Where it makes no progress (no `watchdog.beat`) for `timeout_s`, the
    process ends with exit code 1 within 3 more intervals and prints which rank holds up the job, in
    which op, with its stack. An error from a collective becomes a TrainingError that names the rank
    that is gone. timeout_s=0 sets no limit on hangs."""
    watch, done = RankWatch(folder, rank, world, interval_s), threading.Event()
    way_out = "resume from the last checkpoint"
    sampler = threading.Thread(target=watch.sample, args=(done,), daemon=True)
    with ExitStack() as stack:
        stuck = stack.enter_context(_stuck_file(folder, rank))
        stack.enter_context(
            watchdog.guard(
                timeout_s,
                f"rank {rank} of {world}",
                way_out,
                on_hang=watch.on_hang,
                # earlier than the other ranks read it
                stuck_after_s=timeout_s + interval_s,
                stuck_file=stuck,
            )
        )
        watch.note()
        sampler.start()
        state = "failed"
        try:
            yield watch
            state = "ended"
        except RuntimeError as error:
            if not _from_collective(error):
                raise
            raise watch.explain(error) from error
        finally:
            done.set()
            sampler.join()
            watch.close(state)


def _from_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "HCCL", "Connection closed", "ProcessGroup")
    )


def post_mortem(launched: Path, rank: int) -> str:
    """Returns where a dead rank of this host was last, for a launcher; "" where nothing is
    known."""
    try:
        record = read(Path((launched / f"rank-{rank}").read_text(encoding="utf-8")))
    except OSError:
        return ""
    if record is None:
        return ""
    return f"last seen in {record['begun']}, inside {record['what']}{stack_text(record)}"
