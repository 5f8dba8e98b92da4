"""A run that dies anywhere and is resumed ends bit for bit like one that never did."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from glm_core.training import checkpoint
from glm_core.training.run import run
from glm_core.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
Child = Callable[..., dict[str, int]]
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    # overflows at once, then grows every other step into the next overflow
    "float16": {"dtype": "float16", "loss_scale": 2.0**24, "loss_scale_window": 2},
}


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, toy.__file__],
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(
        folder: Path,
        changes: dict[str, Any],
        event: int = 0,
        in_save: bool = False,
        max_bytes: int = 0,
    ) -> dict[str, int]:
        request = {"folder": str(folder), "changes": changes, "event": event}
        print(
            json.dumps({**request, "in_save": in_save, "max_bytes": max_bytes}),
            file=stdin,
            flush=True,
        )
        reply: dict[str, int] = json.loads(stdout.readline())
        return reply

    yield run
    stdin.close()
    process.wait()
    stdout.close()


@pytest.fixture(scope="module")
def unbroken(
    child: Child, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, int]]:
    """Folder and number of events of the run that nothing disturbs; made once per kind."""
    made: dict[tuple[str, bool], tuple[Path, int]] = {}

    def get(dtype: str, in_save: bool) -> tuple[Path, int]:
        if (dtype, in_save) not in made:
            folder = tmp_path_factory.mktemp(dtype)
            reply = child(folder, DTYPES[dtype], in_save=in_save)
            assert reply["signal"] == 0
            made[dtype, in_save] = folder, reply["events"]
        return made[dtype, in_save]

    return get


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(x).items() if k != "step_ms"} for x in text.splitlines()]


def assert_same_run(folder: Path, other: Path) -> None:
    assert lines(folder) == lines(other)
    assert [line["step"] for line in lines(folder)] == list(range(1, 13))
    for name in ("step-00000009.safetensors", "step-00000012.safetensors"):
        (mine, facts), (theirs, their_facts) = (
            checkpoint.load(f / "checkpoints" / name) for f in (folder, other)
        )
        assert facts == their_facts
        assert all(torch.equal(mine[k], theirs[k]) for k in mine.keys() | theirs.keys())
    assert sorted(p.name for p in folder.rglob("*")) == sorted(p.name for p in other.rglob("*"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", ["anywhere", "in-save"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigkill(
    child: Child, unbroken: Any, tmp_path: Path, dtype: str, where: str, seed: int
) -> None:
    in_save = where == "in-save"
    reference, events = unbroken(dtype, in_save)
    rng = random.Random(seed)
    killed = 0
    for _ in range(2):
        event = rng.randrange(1, events // 2)
        killed += child(tmp_path, DTYPES[dtype], event, in_save)["signal"] == signal.SIGKILL
    assert killed >= 1
    assert child(tmp_path, DTYPES[dtype])["signal"] == 0
    assert_same_run(tmp_path, reference)


def test_killed_by_the_kernel_in_the_middle_of_the_write(
    child: Child, unbroken: Any, tmp_path: Path
) -> None:
    reference, _ = unbroken("float32", False)
    size = (reference / "checkpoints/step-00000009.safetensors").stat().st_size
    reply = child(tmp_path, DTYPES["float32"], max_bytes=size // 2)
    assert reply["signal"] == signal.SIGXFSZ
    assert [p.parent.name for p in (tmp_path / "checkpoints").rglob("*/*")] == [".part"]
    assert child(tmp_path, DTYPES["float32"])["signal"] == 0
    assert_same_run(tmp_path, reference)


def test_float16_run_meets_overflows_before_and_after_a_resume(unbroken: Any) -> None:
    """Otherwise the float16 cases above would say nothing about the loss scale's state."""
    skipped = [line["skipped"] for line in lines(unbroken("float16", False)[0])]
    assert any(skipped[:3])
    assert any(skipped[3:])
    assert not all(skipped)


@pytest.mark.parametrize("forgotten", ["sampler", "loss_scale", "samples_seen", "optimizer_steps"])
def test_forgetting_part_of_the_state_is_noticed(
    unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The comparison above can fail: each part of the state changes the run."""
    dtype = "float16" if forgotten == "loss_scale" else "float32"
    reference, _ = unbroken(dtype, False)
    config = toy.config(**DTYPES[dtype])
    fresh = Trainer(config, toy.Sampler()).state()[1]
    load = checkpoint.load

    def forgetful(path: Path) -> Any:
        tensors, facts = load(path)
        return tensors, {**facts, forgotten: fresh[forgotten]}

    monkeypatch.setattr(checkpoint, "load", forgetful)
    run(
        config,
        tmp_path,
        sampler=toy.Sampler(),
        resume=reference / "checkpoints/step-00000009.safetensors",
    )
    assert lines(tmp_path) != lines(reference)[9:]
