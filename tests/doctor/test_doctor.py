"""`glm-core doctor --hardware`: one command, one folder. Proven on the CPU with a small run; on
every accelerator that is usable here it is the hardware test."""

from __future__ import annotations

import json
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.bench import goals
from glm_core.cli import main
from glm_core.config import ModelConfig, RunConfig, from_dict
from glm_core.conformance import witness
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import Results
from glm_core.conformance.witness import Witness
from glm_core.decode_step import DecodeStep, Stack
from glm_core.doctor import build, decoding, examination
from glm_core.errors import GlmCoreError
from glm_core.measure import ceilings
from glm_core.model.glm import GLM
from glm_core.spec import Support

MODEL = {"num_layers": 1, "hidden": 32, "num_heads": 2, "ffn": 48, "vocab": 512, "max_length": 256}
TIMED = ["utilisation", "goals", "alignment", "peers", "published"]
PARTS = ["conformance", "step", "decoding", *TIMED]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Returns a run that takes seconds, with its own text; the timed model is as small."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th line counts {n * n} sheep.\n" for n in range(3000)))
    monkeypatch.setattr(examination, "preset", lambda name: ModelConfig(**MODEL))
    monkeypatch.setattr(goals, "config_for", lambda backend: ModelConfig(**MODEL))
    monkeypatch.setattr(decoding, "PRECISIONS", {"plain": None})
    monkeypatch.setattr(ceilings, "sizes", lambda backend: (64, 1 << 16))
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


def examined(backend: str, config: RunConfig, out: Path, minutes: float = 60.0) -> dict[str, Any]:
    """Examines a backend and returns the summary in the folder."""
    settings = examination.Examination(
        backend=backend, config=config, minutes=minutes, controls=4, op="geglu", rounds=2
    )
    examination.examine(settings, out)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("backend", ["cpu", "reference:cpu"])
def test_one_folder_says_everything(backend: str, small: RunConfig, tmp_path: Path) -> None:
    if not (state := registry.probe(backend)).ok:
        pytest.skip(state.reason)
    out = tmp_path / "doctor"
    summary = examined(backend, small, out)
    assert summary["ok"], json.dumps(summary["parts"])
    assert summary["finished"]
    assert (list(summary["parts"]), summary["skipped"]) == (PARTS, {})
    assert summary["parts"]["utilisation"]["steps"]["float32"]["tokens_s"] > 0
    assert set(json.loads((out / "decoding.json").read_text())) == set(decoding.PRECISIONS)
    measured = json.loads((out / "goals.json").read_text())["rows"]
    assert set(goals.GOALS) <= set(measured)
    assert all(figure in measured[work] for work, (figure, _) in goals.GOALS.items())
    for part in ("conformance", "published"):
        assert json.loads((out / f"{part}.json").read_text())["failed"] == 0
    names = {p.name for p in out.iterdir()}
    assert {"conformance.html", "alignment.html", "ops.json", "steps.json"} <= names
    assert sum(name.endswith(".trace") for name in names) == 2
    with zipfile.ZipFile(tmp_path / "doctor.zip") as archive:
        assert names == set(archive.namelist()) - {"./"}
    file = str(out / "witness.safetensors")
    assert {id.split("-")[0] for id in witness.load(file).inputs} == {"geglu"}
    assert len(witness.load(file).calls) == summary["parts"]["step"]["calls"] > 10
    assert main(["conformance", "--witness", file]) == 0
    assert main(["align", "witness", file]) == 0


@pytest.mark.skipif(not registry.probe("cpu").ok, reason=registry.probe("cpu").reason)
def test_steps_that_differ_from_their_ops_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.get("cpu")
    step_of = backend.decode_step

    def spoiled(stack: Stack) -> DecodeStep | Support:
        step = step_of(stack)
        assert not isinstance(step, Support)
        wrong = mock.Mock(side_effect=lambda rows, cache: step(rows, cache) * 1.001)
        wrong.max_rows = step.max_rows
        return wrong

    monkeypatch.setattr(decoding, "PRECISIONS", {"plain": None})
    assert decoding.check(backend, torch.float32)["plain"]["ok"]
    monkeypatch.setattr(backend, "decode_step", spoiled)
    found = decoding.check(backend, torch.float32)["plain"]
    assert not found["ok"]
    assert found["differing"] > 0.9 * decoding.STEPS * 2 * decoding.VOCAB


def test_a_part_that_fails_is_recorded_and_the_others_run(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(GLM, "loss", broken)
    summary = examined("reference:cpu", small, tmp_path / "doctor")
    assert not summary["ok"]
    assert summary["parts"]["conformance"]["ok"]
    assert "device lost" in summary["parts"]["alignment"]["error"]
    assert "broken" in (tmp_path / "doctor" / "alignment-traceback.txt").read_text()


def test_a_run_that_is_cut_leaves_the_parts_before(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(examination.PARTS, "utilisation", cut)
    with pytest.raises(KeyboardInterrupt):
        examined("reference", small, tmp_path / "doctor")
    summary = json.loads((tmp_path / "doctor" / "summary.json").read_text())
    assert (list(summary["parts"]), summary["finished"]) == (
        PARTS[: PARTS.index("utilisation")],
        False,
    )
    assert witness.load(tmp_path / "doctor" / "witness.safetensors").calls


def test_a_run_that_is_cut_among_the_cases_leaves_those_before(
    tmp_path: Path, small: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []

    def keep(self: Witness, case: Case, results: Results) -> None:
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(case.id)
        keep_one(self, case, results)

    keep_one = Witness.keep
    monkeypatch.setattr(Witness, "keep", keep)
    monkeypatch.setattr(examination, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        examined("reference", small, tmp_path / "doctor")
    assert list(witness.load(tmp_path / "doctor" / "witness.safetensors").inputs) == kept[:5]


def test_parts_that_would_not_fit_are_skipped_and_named(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(examination.EXPECTED_S) == PARTS
    expected = dict.fromkeys(PARTS, 61) | {"conformance": 59}
    monkeypatch.setattr(examination, "EXPECTED_S", expected)
    summary = examined("reference", small, tmp_path / "doctor", minutes=1.0)
    assert list(summary["parts"]) == PARTS[:1]
    assert list(summary["skipped"]) == PARTS[1:]
    assert summary["skipped"]["step"].startswith("takes about 61 s, ")


def test_the_last_part_takes_the_time_that_is_left(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "EXPECTED_S", dict.fromkeys(PARTS, 60) | {"published": -1e9})
    summary = examined("reference", small, tmp_path / "doctor", minutes=0.0)
    assert list(summary["parts"]) == ["published"]
    assert len(summary["parts"]["published"]["not_run"]) > 2
    assert summary["parts"]["published"]["pass"] == 0


def test_a_folder_in_use_is_refused(small: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor" / "summary.json").write_text("{}")
    with pytest.raises(GlmCoreError, match="is not empty; pass a new folder as --out"):
        examined("reference", small, tmp_path / "doctor")


def test_on_a_device_of_its_own_curves_run_beside_what_is_not_timed(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With backend `meta`, and parts that only say when they run."""
    met = threading.Barrier(2, timeout=60)
    order: list[str] = []

    def part(name: str) -> Callable[..., dict[str, Any]]:
        def run(*args: object) -> dict[str, Any]:
            if name in ("conformance", "alignment"):
                met.wait()  # each waits for the other
            order.append(name)
            return {"ok": True}

        return run

    backend = Backend(name="simulated", device_type="meta", verified="never run")
    monkeypatch.setattr(Backend, "memory_peak_bytes", lambda self: 0)
    monkeypatch.setattr(registry, "usable", lambda name: backend)
    monkeypatch.setattr(examination, "PARTS", {name: part(name) for name in PARTS})
    summary = examined("simulated", small, tmp_path / "doctor")
    assert summary["ok"], summary["parts"]
    assert list(summary["parts"]) == PARTS
    assert order[-4:] == ["utilisation", "goals", "peers", "published"]
    order.clear()
    monkeypatch.setattr(met, "wait", lambda: None)
    examined("simulated", small, tmp_path / "short", minutes=2.0)
    assert order == ["conformance", "step", "decoding", "utilisation", "goals", "published"]


def test_build_installs_this_clone_for_the_card_and_counts_its_time(
    small: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "-c" in command:
            return subprocess.CompletedProcess(command, 0, '[[true, ""], "sm_90"]\n', "")
        if "env" in options:  # what else is run asks for the commit
            ran.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 0, "Successfully installed", "")

    monkeypatch.setattr(subprocess, "run", pip)
    built = build.build("cuda", 60)
    assert ran[0][0][-1] == str(build.SOURCES)
    assert (ran[0][1]["GLM_CORE_BUILD"], ran[0][1]["GLM_CORE_ARCHES"]) == ("cuda", "90")
    settings = examination.Examination(
        backend="reference", config=small, minutes=1.0, build=built._replace(seconds=58.0)
    )
    summary = examination.examine(settings, tmp_path / "doctor")
    assert summary["parts"]["build"]["seconds"] == 58
    assert summary["skipped"]["conformance"] == "takes about 21 s, 2 s were left"
    assert (tmp_path / "doctor" / "build.log").read_text() == "Successfully installed"


def test_a_build_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "-c" in command:
            return subprocess.CompletedProcess(command, 0, '[[true, ""], "gfx90a"]\n', "")
        return subprocess.CompletedProcess(command, 1, "a line\nerror: no hipcc\nmore\n", "")

    with pytest.raises(GlmCoreError, match="builds the kernels of cuda and rocm; leave it out"):
        build.build("cpu", 60)
    if not registry.probe("rocm").ok:
        reason = r"no card to build for: torch .*(without ROCm|built for CUDA)"
        with pytest.raises(GlmCoreError, match=reason):
            build.build("rocm", 60)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(GlmCoreError, match=r"failed: error: no hipcc; for all of it run .*gfx90a"):
        build.build("rocm", 60)
    monkeypatch.setattr(build, "SOURCES", Path("/nowhere"))
    with pytest.raises(GlmCoreError, match=r"/nowhere has no setup\.py"):
        build.build("rocm", 60)


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
    out = str(tmp_path / "doctor")
    command = ["doctor", "--hardware", "--backend", backend, "--minutes", "60", "--out", out]
    assert main(command) == 0
