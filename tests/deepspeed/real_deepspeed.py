"""Says what real DeepSpeed does with the scripts: run now, or read from the witness."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import witness
from peer_runs import HERE, REAL, SCRIPTS, SCRIPTS_4, run
from small import made_state

from glm_core.deepspeed.checkpoint import universal_checkpoint
from glm_core.deepspeed.checkpoint.content import Content

CONFIG_SOURCES = [HERE / "real_config.py", HERE / "recipes.py"]


def sources(script: str) -> list[Path]:
    """Returns the files that decide what a script does."""
    return [*HERE.glob(f"scripts*/{script}.py"), HERE / "small.py"]


def savers() -> list[str]:
    """Returns the scripts that save checkpoints."""
    return [
        name
        for name in sorted([*SCRIPTS, *SCRIPTS_4])
        if "save_checkpoint" in sources(name)[0].read_text()
    ]


def saver_sources() -> list[Path]:
    """Returns the files that decide what the checkpoints are."""
    return [*(sources(name)[0] for name in savers()), HERE / "small.py", HERE / "consolidate.py"]


def make_universal(place: Path) -> None:
    """Writes a universal checkpoint of random numbers, which `scripts/universal.py` loads."""
    state: dict[str, dict[str, Any]] = {
        name: {"step": torch.tensor(4.0), **values} for name, values in made_state().items()
    }
    group = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3).param_groups[0]
    groups = [{k: v for k, v in group.items() if k != "params"}]
    module = {name: values["fp32"] for name, values in state.items()}
    counters = {"global_steps": 4, "global_samples": 32, "skipped_steps": 0}
    content = Content(module, state, groups, None, {}, counters, {"seen": 5})
    universal_checkpoint.write(content, place)


@dataclass
class Live:
    """Real DeepSpeed, which runs each job when something of it is needed."""

    folder: Path

    @functools.cached_property
    def two(self) -> list[Any]:
        make_universal(self.folder / "made" / "here")
        return run("deepspeed", REAL, self.folder / "two", SCRIPTS, self.folder)

    @functools.cached_property
    def four(self) -> list[Any]:
        return run("deepspeed", REAL, self.folder / "four", SCRIPTS_4, self.folder, ranks=4)

    def ranks(self, script: str) -> list[dict[str, Any]]:
        """Returns what each rank saw of the script."""
        return [rank[script] for rank in (self.four if script in SCRIPTS_4 else self.two)]

    @property
    def checkpoints(self) -> Path:
        """The folder in which each script has its checkpoints."""
        assert self.two
        assert self.four
        return self.folder / "deepspeed"

    def report(self) -> dict[str, Any]:
        """Returns the report of real_config.py."""
        done = subprocess.run(
            [REAL, HERE / "real_config.py"],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        line = next(t for t in done.stdout.splitlines() if t.startswith("REPORT"))
        report: dict[str, Any] = json.loads(line.removeprefix("REPORT"))
        return report


@dataclass
class Recorded:
    """The witness, with the methods of `Live`."""

    folder: Path

    def ranks(self, script: str) -> list[dict[str, Any]]:
        """Returns what each rank saw of the script."""
        return witness.unpack_ranks(witness.read(script, sources(script))["ranks"])

    @functools.cached_property
    def checkpoints(self) -> Path:
        """The folder in which each script has its checkpoints."""
        record = witness.read("checkpoints", saver_sources())
        assert record["sha256"] == hashlib.sha256(witness.ARCHIVE.read_bytes()).hexdigest()
        place = self.folder / "deepspeed"
        witness.unpack_archive(witness.ARCHIVE, place)
        return place

    def report(self) -> dict[str, Any]:
        """Returns the report of real_config.py."""
        report: dict[str, Any] = witness.read("config", CONFIG_SOURCES)["report"]
        return report
