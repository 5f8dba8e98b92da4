"""Forks the ranks of a small gloo job for every request on stdin: torch is imported once for all
tests. As a module, the client's side."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forked import work_and_exit


@dataclasses.dataclass(frozen=True)
class Job:
    """How a job ended."""

    codes: list[int | None]
    """exit code by rank, negative for a signal; None: still there at the timeout, or stopped when
    all others had ended; then killed"""
    outputs: list[str]
    """stdout and stderr by rank"""

    @property
    def told(self) -> str:
        """Everything that was said, for the message of a failed assertion."""
        return "\n".join(
            f"--- rank {r}: {c}\n{o}"
            for r, (c, o) in enumerate(zip(self.codes, self.outputs, strict=True))
        )


class Ranks:
    """The process that forks."""

    def __init__(self) -> None:
        here = str(Path(__file__).parent)
        shared = str(Path(__file__).parents[1] / "shared")
        paths = [here, shared, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )

    def run(
        self, function: str, world: int, *args: Any, folder: Path, timeout_s: float = 150.0
    ) -> Job:
        """Runs `module.function(*args)` on every rank, in `folder`, where its output goes too."""
        request = {
            "function": function,
            "world": world,
            "args": args,
            "folder": str(folder),
            "timeout_s": timeout_s,
        }
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the forking process has died"
        outputs = [(folder / f"rank-{r}.out").read_text() for r in range(world)]
        return Job(json.loads(answer), outputs)

    def close(self) -> None:
        """Ends it and whatever it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def fork(request: dict[str, Any]) -> list[int | None]:
    """One job."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    world, pids = request["world"], []
    for rank in range(world):
        if not (pid := os.fork()):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in variables.items()}, MASTER_ADDR="localhost")
            _child(request, rank)
        pids.append(pid)
    return _reap(pids, time.monotonic() + request["timeout_s"])


def _child(request: dict[str, Any], rank: int) -> None:
    module, _, name = request["function"].rpartition(".")
    os.chdir(request["folder"])
    work_and_exit(
        Path(request["folder"]) / f"rank-{rank}.out",
        lambda: getattr(importlib.import_module(module), name)(*request["args"]),
    )


def _reap(pids: list[int], deadline: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    stopped: set[int] = set()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                if done and os.WIFSTOPPED(status):
                    stopped.add(pid)
                elif done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline or len(codes) + len(stopped) == len(pids):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
                    stopped.discard(pid)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    """The forking process."""
    import elastic_workers  # noqa: F401  # before the first fork

    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
