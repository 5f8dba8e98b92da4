"""The scripts' runs on two processes each, once per session, for all tests of this folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
REAL = ROOT / ".venv-deepspeed/bin/python"
SCRIPTS = sorted(p.stem for p in (HERE / "scripts").glob("*.py") if p.stem != "take_over")
LIMIT_S = 240


def run(peer: str, python: Path, out: Path, scripts: list[str], foreign: Path) -> list[Any]:
    """What each rank saw; the processes' own words where they failed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ, "PEER": peer, "CHECKPOINTS": str(out.parent / peer), "DS_ACCELERATOR": "cpu",
        "FOREIGN": str(foreign), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [str(python), str(HERE / "run_scripts.py"), str(out), *scripts]
    logs = [out.with_suffix(f".log{r}") for r in range(2)]
    processes = [
        subprocess.Popen(
            command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=logs[r].open("w"), stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        codes = [p.wait(LIMIT_S) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    words = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0, 0], f"{peer}: exit codes {codes}\n{words}"
    return [torch.load(f"{out}.{r}") for r in range(2)]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Real DeepSpeed's run, and the folder of its checkpoints."""
    if not REAL.exists():
        pytest.skip("no .venv-deepspeed: make deepspeed (tests/deepspeed/setup_deepspeed.sh)")
    folder = tmp_path_factory.mktemp("real")
    seen = run("deepspeed", REAL, folder / "seen", SCRIPTS, folder)
    return seen, folder / "deepspeed"


@pytest.fixture(scope="session")
def ours(real: tuple[list[Any], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our run of the same scripts, and of the one that goes on from DeepSpeed's checkpoint."""
    folder = tmp_path_factory.mktemp("ours")
    python = Path(sys.executable)
    seen = run("ours", python, folder / "seen", [*SCRIPTS, "take_over"], real[1])
    return seen, folder / "ours"
