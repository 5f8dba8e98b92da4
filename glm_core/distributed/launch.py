"""Starts the processes of a job: by torchrun's API on each host, by ssh on the other hosts."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from glm_core.distributed.watch import post_mortem
from glm_core.environment import API_KEY, WATCH
from glm_core.errors import ConfigError, TrainingError, unknown

FORWARDED = re.compile(r"(NCCL|HCCL|RCCL|GLOO|GLM_CORE|OMP|TORCH)_\w+|PYTHONPATH|LD_LIBRARY_PATH")
"""environment variables that are passed on to the other hosts, in commands that everyone there can
list: so never the API key"""
_LINE = re.compile(r"(?P<name>[^\s=]+)\s+slots=(?P<slots>\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """processes to start there"""


def parse_hostfile(text: str, where: str = "hostfile") -> list[Host]:
    """Parses DeepSpeed's hostfile: a line `NAME slots=N` for each host, comments after `#`. Raises
    ConfigError that lists every bad line."""
    hosts: dict[str, Host] = {}
    bad: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            bad.append(f"line {number} is {line!r}, not 'NAME slots=N'")
        elif not int(match["slots"]):
            bad.append(f"line {number}: {match['name']} has no slots; remove the line")
        elif match["name"] in hosts:
            bad.append(f"line {number}: {match['name']} is there already; add up its slots")
        else:
            hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not bad and not hosts:
        bad = ["names no host; write lines such as 'worker-1 slots=8'"]
    if bad:
        raise ConfigError(f"{where}: {'; '.join(bad)}")
    return list(hosts.values())


def read_hostfile(path: Path) -> list[Host]:
    """Reads a hostfile. Raises ConfigError where it cannot be read or has bad lines."""
    try:
        return parse_hostfile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a hostfile ({error})") from None


def select_hosts(hosts: list[Host], include: str, exclude: str) -> list[Host]:
    """Applies DeepSpeed's `--include` or `--exclude`, names joined by `@`. Raises ConfigError for
    both at once, an unknown host, single slots, or where no host is left."""
    if include and exclude:
        raise ConfigError("--include and --exclude: both are given; give one of them")
    named = [name for name in (include or exclude).split("@") if name]
    for name in named:
        if ":" in name:
            raise ConfigError(
                f"{name}: single slots cannot be chosen; set slots= in the hostfile and the "
                "vendor's variable (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES) on that host"
            )
        if name not in {host.name for host in hosts}:
            raise ConfigError(unknown("host", name, [host.name for host in hosts]))
    selected = [h for h in hosts if not named or (h.name in named) == bool(include)]
    if not selected:
        raise ConfigError(f"--exclude {exclude}: leaves no host of the hostfile")
    return selected


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start, on which hosts."""

    hosts: tuple[Host, ...]
    program: tuple[str, ...]
    """a script and its arguments, or `-m`, a module and its arguments"""
    address: str
    """address of the first host, as the others reach it"""
    port: int = 29500
    restarts: int = 0
    """how often torchrun may restart all processes after one has failed"""
    ssh_port: int = 22


def torchrun_arguments(launch: Launch, index: int) -> list[str]:
    """Returns torchrun's arguments on host number `index`."""
    words = [f"--nproc-per-node={launch.hosts[index].slots}", f"--max-restarts={launch.restarts}"]
    if len(launch.hosts) == 1:
        # not --standalone: that takes the host's own name, which need not resolve
        words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    else:
        words += [
            f"--nnodes={len(launch.hosts)}",
            f"--node-rank={index}",
            f"--master-addr={launch.address}",
            f"--master-port={launch.port}",
        ]
    return [*words, *launch.program]


def remote_commands(launch: Launch, environment: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Returns the ssh command of each host, in the order of ranks. Working folder and interpreter
    are those of this process."""
    exports = [
        f"{k}={shlex.quote(v)}"
        for k, v in sorted(environment)
        if FORWARDED.fullmatch(k) and k != API_KEY
    ]
    before = f"cd {shlex.quote(os.getcwd())} && exec {' '.join(['env', *exports])}"
    lines = []
    for index, host in enumerate(launch.hosts):
        words = [
            sys.executable,
            "-m",
            "glm_core.distributed.launch",
            *torchrun_arguments(launch, index),
        ]
        inner = f"{before} {shlex.join(words)}"
        # -tt: the remote processes end when the connection does
        lines.append(
            ["ssh", "-tt", "-o", "BatchMode=yes", "-p", str(launch.ssh_port), host.name, inner]
        )
    return lines


def run_on_hosts(launch: Launch, poll_s: float = 0.2) -> None:
    """Starts the job on every host by ssh and waits. When a host fails, the others are ended.
    Raises TrainingError that names the first host that failed."""
    running = {
        host.name: subprocess.Popen(words, stdin=subprocess.DEVNULL)
        for host, words in zip(
            launch.hosts, remote_commands(launch, os.environ.items()), strict=True
        )
    }
    try:
        while True:
            codes = {name: p.poll() for name, p in running.items()}
            if failed := [name for name, code in codes.items() if code]:
                raise TrainingError(
                    f"host {failed[0]}: ended with exit code {codes[failed[0]]}; its own lines "
                    "above say why (255: ssh could not reach it)"
                )
            if None not in codes.values():
                return
            time.sleep(poll_s)
    finally:
        _end(list(running.values()))


PATIENCE_S = 30.0
"""how long torchrun has to end its processes"""


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Sends SIGTERM, on which torchrun ends its processes; kills those that still run after
    PATIENCE_S, as a torchrun whose own part is done and which waits for the other hosts."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_locally(processes: int, program: Sequence[str]) -> None:
    """Runs `program` on this host alone. Raises TrainingError where a process failed."""
    if processes < 1:
        raise ConfigError(f"--processes {processes}: must be at least 1")
    run_torchrun(
        torchrun_arguments(
            Launch(
                hosts=(Host("localhost", processes),),
                program=tuple(program),
                address="localhost",
            ),
            0,
        )
    )


def run_torchrun(words: Sequence[str]) -> None:
    """Runs torchrun in this process. Raises TrainingError that names the first process that failed,
    how it ended, and where it was last (glm_core.distributed.watch)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    with TemporaryDirectory(prefix="glm-core-") as folder:
        os.environ[WATCH] = folder
        try:
            torchrun.run(torchrun.parse_args(list(words)))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            last_seen = post_mortem(Path(folder), rank)
            raise TrainingError(
                f"rank {rank} (pid {failure.pid}): ended first, by {how}; "
                + (last_seen or "its own lines above say why")
            ) from None


if __name__ == "__main__":
    try:
        run_torchrun(sys.argv[1:])
    except TrainingError as error:
        print(f"glm-core: {error}", file=sys.stderr)
        raise SystemExit(1) from None
