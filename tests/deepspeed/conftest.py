"""Runs the scripts once per session, for all tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# importlib mode leaves sys.path alone; what several tests share lies beside them
sys.path.insert(0, str(Path(__file__).parent))

from peer_runs import (
    CONTROLS,
    HERE,
    LACK,
    OURS_2,
    OURS_4,
    REAL,
    SCRIPTS,
    SCRIPTS_4,
    differences,
    run,
)
from small import made_state

from glm_core.deepspeed import notices
from glm_core.deepspeed.checkpoint import universal_checkpoint
from glm_core.deepspeed.checkpoint.content import Content


@pytest.fixture(autouse=True)
def no_notice_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes lines that are printed once per process appear once per test."""
    monkeypatch.setattr(notices, "_shown", set())


def make_universal(place: Path) -> None:
    """Writes a universal checkpoint of random numbers."""
    state: dict[str, dict[str, Any]] = {
        name: {"step": torch.tensor(4.0), **values} for name, values in made_state().items()
    }
    group = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3).param_groups[0]
    groups = [{k: v for k, v in group.items() if k != "params"}]
    module = {name: values["fp32"] for name, values in state.items()}
    counters = {"global_steps": 4, "global_samples": 32, "skipped_steps": 0}
    content = Content(module, state, groups, None, {}, counters, {"seen": 5})
    universal_checkpoint.write(content, place)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Returns what real DeepSpeed's run of the scripts saw, and the folder of its checkpoints."""
    if LACK:
        pytest.skip(LACK)
    folder = tmp_path_factory.mktemp("real")
    make_universal(folder / "made" / "here")
    seen = run("deepspeed", REAL, folder / "seen", SCRIPTS, folder)
    return seen, folder / "deepspeed"


@pytest.fixture(scope="session")
def ours(real: tuple[list[Any], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns what our run of the same scripts saw, and of those that resume from DeepSpeed's
    checkpoints."""
    folder = tmp_path_factory.mktemp("ours")
    python = Path(sys.executable)
    make_universal(folder / "made" / "here")
    seen = run("ours", python, folder / "seen", [*SCRIPTS, *OURS_2], real[1])
    return seen, folder / "ours"


@pytest.fixture(scope="session")
def spread(ours: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, float]:
    """Returns by dtype how far our own results move when only the order of sums changes, and in
    bfloat16 the dtype in which gradients are summed: the largest difference over the dtype's
    control scripts."""
    folder = tmp_path_factory.mktemp("otherwise")
    names = [name for group in CONTROLS.values() for name in group]
    other = run("otherwise", Path(sys.executable), folder / "seen", names, folder)
    return {
        dtype: max(
            max(differences(a[name], b[name]).values())
            for name in group
            for a, b in zip(other, ours[0], strict=True)
        )
        for dtype, group in CONTROLS.items()
    }


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Returns the report of real_config.py."""
    if LACK:
        pytest.skip(LACK)
    done = subprocess.run(
        [REAL, HERE / "real_config.py"],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(t for t in done.stdout.splitlines() if t.startswith("REPORT"))
    found: dict[str, Any] = json.loads(line.removeprefix("REPORT"))
    return found


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Returns what real DeepSpeed's and our run of the scripts for four processes saw."""
    if LACK:
        pytest.skip(LACK)
    folder = tmp_path_factory.mktemp("four")
    theirs = run("deepspeed", REAL, folder / "theirs", SCRIPTS_4, folder, ranks=4)
    scripts, foreign = [*SCRIPTS_4, *OURS_4], folder / "deepspeed"
    mine = run("ours", Path(sys.executable), folder / "mine", scripts, foreign, ranks=4)
    return theirs, mine
