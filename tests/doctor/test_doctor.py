"""`glm-core doctor --hardware`: one command, one file. Proven on the CPU with a small run; on every
accelerator that is usable here it is the hardware test."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from glm_core.backends import registry
from glm_core.cli import main
from glm_core.config import ModelConfig, RunConfig, from_dict
from glm_core.doctor import examination
from glm_core.model.glm import GLM

MODEL = {"num_layers": 1, "hidden": 32, "num_heads": 2, "ffn": 48, "vocab": 512, "max_length": 256}
PARTS = {"conformance", "alignment", "utilisation"}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Returns a run that takes seconds, with its own text; the timed model is as small."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th line counts {n * n} sheep.\n" for n in range(3000)))
    monkeypatch.setattr(examination, "preset", lambda name: ModelConfig(**MODEL))
    monkeypatch.setattr(examination.Examination, "dtypes", lambda self, backend: ["float32"])
    monkeypatch.chdir(tmp_path)
    return from_dict(
        RunConfig,
        {
            "model": {**MODEL, "max_length": 32},
            "data": {"path": str(text), "vocab": 512, "length": 32},
            "train": {"steps": 6, "warmup_steps": 2, "micro_batch": 2, "global_batch": 2},
        },
    )


def examined(backend: str, config: RunConfig, folder: Path) -> dict[str, bytes]:
    """Examines a backend and returns the files of the archive."""
    settings = examination.Examination(
        backend=backend, config=config, controls=4, op="geglu", rounds=2
    )
    examination.examine(settings, folder / "doctor.zip")
    with zipfile.ZipFile(folder / "doctor.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("backend", ["cpu", "reference:cpu"])
def test_one_file_says_everything(backend: str, small: RunConfig, tmp_path: Path) -> None:
    if not (state := registry.probe(backend)).ok:
        pytest.skip(state.reason)
    files = examined(backend, small, tmp_path)
    summary = json.loads(files["summary.json"])
    assert summary["ok"], json.dumps(summary["parts"])
    assert set(summary["parts"]) == PARTS
    assert summary["parts"]["utilisation"]["steps"]["float32"]["tokens_s"] > 0
    assert json.loads(files["conformance.json"])["failed"] == 0
    assert {"conformance.html", "alignment.html", "ops.json", "steps.json"} <= set(files)
    assert sum(name.endswith(".trace") for name in files) == 2


def test_a_part_that_fails_is_recorded_and_the_others_run(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(GLM, "loss", broken)
    files = examined("reference", small, tmp_path)
    summary = json.loads(files["summary.json"])
    assert not summary["ok"]
    assert summary["parts"]["conformance"]["ok"]
    assert "device lost" in summary["parts"]["alignment"]["error"]
    assert b"broken" in files["alignment-traceback.txt"]


def test_usage_and_absent_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 2
    assert "glm-core doctor --hardware --backend NAME" in capsys.readouterr().err
    if not registry.probe("cuda").ok:
        assert main(["doctor", "--hardware", "--backend", "cuda"]) == 3
        assert registry.probe("cuda").reason in capsys.readouterr().err


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["ascend", "cuda", "rocm"])
def test_on_hardware(backend: str, tmp_path: Path) -> None:
    if not (state := registry.probe(backend)).ok:
        pytest.skip(state.reason)
    out = tmp_path / "doctor.zip"
    assert main(["doctor", "--hardware", "--backend", backend, "--out", str(out)]) == 0
