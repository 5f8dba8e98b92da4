"""The scripts' runs, once per session, for all tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# importlib mode leaves sys.path alone; what several tests share lies beside them
sys.path.insert(0, str(Path(__file__).parent))

from peer_runs import HERE, OURS, REAL, SCRIPTS, SCRIPTS_4, run


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
    """Our run of the same scripts, and of those that go on from DeepSpeed's checkpoints."""
    folder = tmp_path_factory.mktemp("ours")
    python = Path(sys.executable)
    seen = run("ours", python, folder / "seen", [*SCRIPTS, *OURS], real[1])
    return seen, folder / "ours"


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """What real_config.py tells."""
    if not REAL.exists():
        pytest.skip("no .venv-deepspeed: make deepspeed (tests/deepspeed/setup_deepspeed.sh)")
    done = subprocess.run(
        [REAL, HERE / "real_config.py"],
        env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = next(t for t in done.stdout.splitlines() if t.startswith("REPORT"))
    found: dict[str, Any] = json.loads(line.removeprefix("REPORT"))
    return found


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Real DeepSpeed's and our run of the scripts for four processes."""
    if not REAL.exists():
        pytest.skip("no .venv-deepspeed: make deepspeed (tests/deepspeed/setup_deepspeed.sh)")
    folder = tmp_path_factory.mktemp("four")
    theirs = run("deepspeed", REAL, folder / "theirs", SCRIPTS_4, folder, ranks=4)
    mine = run("ours", Path(sys.executable), folder / "mine", SCRIPTS_4, folder, ranks=4)
    return theirs, mine
