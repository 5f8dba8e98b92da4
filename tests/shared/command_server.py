"""Runs commands of glm-core in forks of one process, which has imported torch: `python
command_server.py SOCKET PACKAGES`. CLIENT is the program that stands for `glm-core`: it hands over
its words, folder, environment and streams, and ends with the command's exit code."""

from __future__ import annotations

import importlib
import json
import os
import site
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [b"x"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    code = server.recv(9)
sys.exit(int(code) if code else 70)
"""
"""a format of the interpreter and the server's socket"""
PRELOADED = (
    "glm_core.align.bisection",
    "glm_core.align.jobs",
    "glm_core.align.report",
    "glm_core.conformance.run",
    "glm_core.training.loop",
    "torch.fx.experimental.symbolic_shapes",  # and sympy: torch's own, for any gradient
)
"""what most commands import, torch included: each of them then does not"""


def run(request: bytes, streams: list[int], packages: str) -> int:
    """Runs one command in this process; returns its exit code."""
    from glm_core.cli import main

    words, folder, environment = json.loads(request)
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.invalidate_caches()
    site.addsitedir(packages)  # what was installed since
    sys.argv = ["glm-core", *words]
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main(path: str, packages: str) -> None:
    """Serves until its standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            with connection:
                _, streams, _, _ = socket.recv_fds(connection, 1, 3)
                parts = iter(lambda: connection.recv(1 << 16), b"")  # noqa: B023  # used at once
                request = b"".join(parts)
                if not (pid := os.fork()):
                    code = run(request, streams, packages)
                    connection.sendall(str(code).encode())
                    os._exit(0)
                os.waitpid(pid, 0)
                for stream in streams:
                    os.close(stream)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), sys.argv[2])
