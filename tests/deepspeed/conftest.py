"""Runs the scripts once per session, for all tests of this folder. What real DeepSpeed does is
read from the witness; with `--deepspeed live` it runs too."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import workers

# importlib mode leaves sys.path alone; what several tests share lies beside them
sys.path.insert(0, str(Path(__file__).parent))

from peer_runs import (
    CONTROLS,
    LACK,
    OURS_2,
    OURS_4,
    SCRIPTS,
    SCRIPTS_4,
    differences,
    load,
    run,
)
from real_deepspeed import Live, Recorded, make_universal

from glm_core.deepspeed import notices
from glm_core.distributed import fsdp


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deepspeed",
        choices=("recorded", "live"),
        default="recorded",
        help="where real DeepSpeed's results come from: tests/deepspeed/witness, or it runs now",
    )


@pytest.fixture(autouse=True)
def no_notice_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes lines that are printed once per process appear once per test."""
    monkeypatch.setattr(notices, "_shown", set())


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a function that returns a folder of all workers, which the first that needs it
    fills."""

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder = workers.common(tmp_path_factory) / f"deepspeed-{name}"
        with workers.locked(folder):
            if not (folder / "complete").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / "complete").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Live | Recorded:
    """Returns what real DeepSpeed does with the scripts."""
    folder = tmp_path_factory.mktemp("real")
    if request.config.getoption("deepspeed", "recorded") == "recorded":
        return Recorded(folder)
    if LACK:
        pytest.fail(f"--deepspeed live: {LACK}")
    return Live(folder)


@pytest.fixture(scope="session")
def ours(real: Live | Recorded, once: Any) -> tuple[list[Any], Path]:
    """Returns what each rank saw in our run of the scripts, of those that resume from DeepSpeed's
    checkpoints, and of the controls with other roundings; and the folder of checkpoints."""
    if reason := fsdp.lack():
        pytest.skip(reason)
    controls = [f"otherwise:{name}" for group in CONTROLS.values() for name in group]
    scripts = [*SCRIPTS, *OURS_2, *controls]

    def fill(folder: Path) -> None:
        make_universal(folder / "made" / "here")
        run("ours", sys.executable, folder / "seen", scripts, real.checkpoints)

    folder = once("two", fill)
    return load(folder / "seen", 2), folder / "ours"


@pytest.fixture(scope="session")
def ours_on_four(real: Live | Recorded, once: Any) -> list[Any]:
    """Returns what each rank saw in our run of the scripts for four processes."""
    scripts = [*SCRIPTS_4, *OURS_4]

    def fill(folder: Path) -> None:
        run("ours", sys.executable, folder / "seen", scripts, real.checkpoints, ranks=4)

    return load(once("four", fill) / "seen", 4)


@pytest.fixture(scope="session")
def spread(ours: tuple[list[Any], Path]) -> dict[torch.dtype, float]:
    """Returns by dtype how far our own results move when only the order of sums changes, and in
    bfloat16 the dtype in which gradients are summed: the largest difference over the dtype's
    control scripts."""
    return {
        dtype: max(
            max(differences(rank[f"otherwise:{name}"], rank[name]).values())
            for name in group
            for rank in ours[0]
        )
        for dtype, group in CONTROLS.items()
    }


@pytest.fixture(scope="session")
def reference(real: Live | Recorded) -> dict[str, Any]:
    """Returns the report of real_config.py."""
    return real.report()
