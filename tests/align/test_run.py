"""align.run judges every backend against the reference, keeps the traces, and prints the JSON that
others rely on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import markov
import pytest

from glm_core import align
from glm_core.align.trace import load
from glm_core.config import DataConfig, RunConfig
from glm_core.errors import BackendUnavailableError, GlmCoreError

WORK = ("reference", "control 4 of 4", "honest", "wrong:positions")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> align.RunResult:
    honest, wrong = markov.backend(), markov.backend(rope=lambda x, cos, sin, interleaved: x)
    honest.name, wrong.name = "honest", "wrong:positions"
    told: list[str] = []
    found = align.run(
        markov.config("float32", steps=6),
        ["reference", honest, wrong],
        controls=4,
        out_dir=tmp_path_factory.mktemp("run"),
        sampler=markov.Markov,
        capture_steps=(2, 6),
        progress=lambda what, done, of: told.append(what),
    )
    assert {f"float32: {w}" for w in WORK} <= set(told)
    return found


def test_each_candidate_has_its_verdict(result: align.RunResult) -> None:
    assert [(p.candidate, p.verdict) for p in result.pairs] == [
        ("honest", "aligned"),
        ("wrong:positions", "diverged"),
    ]
    assert result.verdict == "diverged"
    assert {f.op for f in result.pairs[1].findings} == {"rope"}


def test_traces_are_kept(result: align.RunResult) -> None:
    files = sorted(p.name for p in result.out_dir.iterdir())
    assert files == [
        "honest-float32.trace",
        "reference-float32.trace",
        "wrong-positions-float32.trace",
    ]
    again = align.compare(*(load(result.out_dir / f) for f in (files[1], files[2])))
    assert again.to_json() == result.pairs[1].to_json()


def test_the_json_has_the_names_others_rely_on(result: align.RunResult) -> None:
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["verdict"] == "diverged"
    names = {
        "reference",
        "candidate",
        "verdict",
        "max_envelope_ratio",
        "max_gradient_ratio",
        "first_step",
    }
    assert all(names <= set(pair) for pair in plain["pairs"])
    assert plain["pairs"][0]["first_step"] is None
    assert Path(plain["traces"]["honest-float32"]).is_file()


def of_text(folder: Path, text: str) -> RunConfig:
    (folder / "text.txt").write_text(text)
    config = markov.config("float32", steps=2)
    data = DataConfig(path=str(folder / "text.txt"), vocab=300, length=32)
    return dataclasses.replace(
        config, data=data, model=dataclasses.replace(config.model, vocab=320)
    )


def test_dtypes_run_side_by_side(tmp_path: Path) -> None:
    words = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("a", "eo", "ist", "ure", "on")]
    text = "\n\n".join(
        " ".join(words[(i * k + k * k) % len(words)] for k in range(60)) for i in range(60)
    )
    told: dict[str, int] = {}
    found = align.run(
        of_text(tmp_path, text),
        ["reference:cpu"],
        dtypes=("float32", "bfloat16"),
        controls=4,
        out_dir=tmp_path / "out",
        cache_dir=str(tmp_path / "cache"),
        capture_steps=(2,),
        progress=lambda what, done, of: told.__setitem__(what, done),
    )
    assert [(p.candidate, p.dtype, p.verdict) for p in found.pairs] == [
        ("reference:cpu", "float32", "aligned"),
        ("reference:cpu", "bfloat16", "aligned"),
    ]
    assert told["bfloat16: reference:cpu"] == told["float32: control 4 of 4"] == 2
    assert set(found.traces) == {
        f"{b}-{d}" for b in ("reference", "reference:cpu") for d in ("float32", "bfloat16")
    }


def test_a_workers_error_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(GlmCoreError, match=r"text\.txt"):
        align.run(
            of_text(tmp_path, ""),
            ["reference:cpu"],
            dtypes=("float32", "bfloat16"),
            out_dir=tmp_path / "out",
            cache_dir=str(tmp_path / "cache"),
        )


def test_the_reference_alone_is_aligned_with_itself(tmp_path: Path) -> None:
    found = align.run(
        markov.config("float32", steps=2),
        ["reference"],
        controls=4,
        out_dir=tmp_path,
        sampler=markov.Markov,
        capture_steps=(1,),
    )
    assert (found.verdict, found.pairs) == ("aligned", [])


@pytest.mark.parametrize(
    ("name", "error"), [("cude", GlmCoreError), ("reference:nowhere", BackendUnavailableError)]
)
def test_a_backend_that_is_not_there_is_refused_before_anything_runs(
    name: str, error: type[GlmCoreError], tmp_path: Path
) -> None:
    with pytest.raises(error, match=name.partition(":")[2] or "known"):
        align.run(markov.config("float32"), [name], out_dir=tmp_path, sampler=forbidden)


def forbidden() -> markov.Markov:
    raise AssertionError("a run was started")


def test_record_alone_brings_its_own_reference() -> None:
    config = markov.config("bfloat16", steps=3)
    trace = align.record(config, markov.backend(), sampler=markov.Markov, capture_steps=(1, 3))
    assert trace.capture_steps == [1, 3]
    assert trace.tests
    assert trace.control_loss.shape == (0, 3)
    reference = align.record(
        config, "reference", sampler=markov.Markov, controls=4, capture_steps=(3,)
    )
    assert reference.control_loss.shape == (4, 3)
    assert align.compare(reference, trace).verdict == "aligned"
