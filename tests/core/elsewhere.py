"""Runs the pure Python path where a system lacks what Linux has: `elsewhere.py macos windows`. Each
system is a fork of this process, with a folder of its own and its output in the file `log` there.

Nothing is removed from torch or the standard library's own modules, which differ by system; what
glm_core looks up itself raises as it would there."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import pathlib
import pkgutil
import platform
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

from forked import work_and_exit

# third parties load before anything is taken away
for third_party in ("torch._dynamo", "torch.distributed.run", "torch.distributed.tensor"):
    importlib.import_module(third_party)
sysconfig.get_config_vars()  # Python 3.10 reads its own at the first call, by the system's name

LINUX = (
    "sched_getaffinity",
    "sched_setaffinity",
    "fork",
    "forkpty",
    "posix_fallocate",
    "memfd_create",
)
POSIX = ("pread", "pwrite", "killpg", "getpgid", "setsid", "uname", "nice")
MODULES = {"macos": (), "windows": ("fcntl", "resource", "termios", "pwd", "grp", "readline")}
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "setitimer", "alarm")
FOLDERS = ("/proc", "/sys", "/dev/shm")
CONFIG = """
[model]
num_layers = 1
hidden = 32
num_heads = 2
ffn = 48
vocab = 512
max_length = 32
[data]
path = "text.txt"
vocab = 512
length = 32
[train]
backend = "reference"
steps = 2
warmup_steps = 1
micro_batch = 2
global_batch = 2
save_every = 1
"""
OPTIONAL = {"deepspeed", "triton", "onnxruntime", "transformers", "tensorboard", "fastapi"}


def take_away(system: str) -> None:
    """Removes the names, and has glm_core's imports and every open file of Linux's fail."""
    windows = system == "windows"
    for name in (*LINUX, *(POSIX if windows else ())):
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS if windows else ():
        delattr(signal, name)
    plain_import, plain_open = builtins.__import__, io.open

    def import_(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        ours = (globals or {}).get("__name__", "").startswith("glm_core")
        if ours and name.partition(".")[0] in MODULES[system]:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain_import(name, globals, *rest, **named)

    def open_(file: Any, *rest: Any, **named: Any) -> Any:
        if str(file).startswith(FOLDERS):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return plain_open(file, *rest, **named)

    builtins.__import__, builtins.open, io.open = import_, open_, open_
    if sys.version_info < (3, 11):  # there pathlib has its own reference to io.open
        pathlib._normal_accessor.open = open_
    if not windows:
        sys.platform = "darwin"
        platform.system = lambda: "Darwin"


def import_everything() -> int:
    """Imports every module of ours and returns how many there are. A third party's absence is its
    own."""
    import glm_core

    names = [m.name for m in pkgutil.walk_packages(glm_core.__path__, "glm_core.")]
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
    return len(names)


def main(system: str) -> None:
    """Takes away, imports, and runs three commands."""
    take_away(system)
    from glm_core import cli
    from glm_core.measure.memory import resident_peak_bytes
    from glm_core.measure.noise import NoiseWatch
    from glm_core.measure.timing import cpu_name

    print("modules:", import_everything())
    Path("small.toml").write_text(CONFIG, encoding="utf-8")
    Path("text.txt").write_text("the quick brown fox jumps over it. " * 400, encoding="utf-8")
    commands = (
        "devices",
        "conformance --backend reference --op rms_norm --mode test",
        "train --config small.toml --out run",
        "train --config small.toml --out run --resume",
    )
    for command in commands:
        print("exit", cli.main(command.split()), command, flush=True)
    print("noise:", *NoiseWatch().notes())
    print("cpu known:", bool(cpu_name()), "memory:", resident_peak_bytes() > 0)


if __name__ == "__main__":
    for system in sys.argv[1:]:
        Path(system).mkdir()
        if not (child := os.fork()):
            os.chdir(system)
            work_and_exit(Path("log"), functools.partial(main, system))
        os.waitpid(child, 0)
