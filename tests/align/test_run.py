"""align.run judges every backend against the reference, keeps the traces, and prints the JSON that
others rely on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import markov
import pytest
import torch

from glm_core import align, ops
from glm_core.align import report
from glm_core.align.calibration import open_data
from glm_core.align.controls import train_control
from glm_core.align.explanation import headline
from glm_core.align.trace import load
from glm_core.backends.base import Backend
from glm_core.cli.align import report_text
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.errors import BackendUnavailableError, ConfigError, GlmCoreError
from glm_core.faults.catalogue import FAULTS

WORK = ("reference", "control 4 of 4", "honest", "wrong:positions")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> align.RunResult:
    honest, wrong = markov.backend(), markov.backend(rope=lambda x, cos, sin, interleaved: x)
    honest.name, wrong.name = "honest", "wrong:positions"
    told: dict[str, tuple[int, int]] = {}
    found = align.run(
        markov.config("float32", steps=3),
        ["reference", honest, wrong],
        controls=4,
        out_dir=tmp_path_factory.mktemp("run"),
        sampler=markov.Markov,
        capture_steps=(2, 3),
        progress=lambda what, done, of: told.__setitem__(what, (done, of)),
    )
    assert {f"float32: {w}" for w in WORK} <= set(told)
    shares = [done / of for done, of in told.values()]
    assert shares == sorted(shares), "the progress is that of the whole run"
    assert shares[-1] == 1
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
    told, of = dict[str, int](), list[int]()
    config, cache = of_text(tmp_path, text), str(tmp_path / "cache")
    found = align.run(
        config,
        ["reference:cpu"],
        dtypes=("float32", "bfloat16"),
        controls=4,
        out_dir=tmp_path / "out",
        cache_dir=cache,
        capture_steps=(2,),
        progress=lambda what, done, total: (told.__setitem__(what, done), of.append(total))[0],
    )
    assert [(p.candidate, p.dtype, p.verdict) for p in found.pairs] == [
        ("reference:cpu", "float32", "aligned"),
        ("reference:cpu", "bfloat16", "aligned"),
    ]
    assert {"bfloat16: reference:cpu", "float32: control 4 of 4"} <= set(told)
    assert max(told.values()) == of[0] == 2 * (2 * (1 + 4 + 2) + 13)
    assert set(found.traces) == {
        f"{b}-{d}" for b in ("reference", "reference:cpu") for d in ("float32", "bfloat16")
    }
    trained = train_control(config, 3, 4, open_data(config, cache), lambda *_: None)
    assert found.trace("reference", "float32").control_loss[3].tolist() == trained.loss


def test_a_workers_error_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(GlmCoreError, match=r"text\.txt"):
        align.run(
            of_text(tmp_path, ""),
            ["reference:cpu"],
            dtypes=("float32", "bfloat16"),
            out_dir=tmp_path / "out",
            cache_dir=str(tmp_path / "cache"),
        )


@pytest.mark.parametrize(
    ("backends", "fact"),
    [(["reference"], "nothing to judge"), ([], "nothing to judge"), (["null"], "no values")],
    ids=str,
)
def test_what_leaves_nothing_to_judge_is_refused(
    backends: list[str], fact: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fact):
        align.run(markov.config("float32", steps=2), backends, out_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "error"), [("cude", GlmCoreError), ("reference:nowhere", BackendUnavailableError)]
)
def test_a_backend_that_is_not_there_is_refused_before_anything_runs(
    name: str, error: type[GlmCoreError], tmp_path: Path
) -> None:
    with pytest.raises(error, match=name.partition(":")[2] or "known"):
        align.run(markov.config("float32"), [name], out_dir=tmp_path, sampler=forbidden)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"controls": 1}, "controls=1: the envelope needs at least 4 control runs; use 6"),
        ({"controls": 0}, "the envelope needs at least 4"),
        ({"dtypes": ("float32", "float16")}, "backend narrow computes in float32, bfloat16; use"),
        ({"without": ("curves",)}, "unknown part 'curves'; known: curve, ops"),
        ({"without": ("curve", "ops")}, "nothing is judged; leave out one of them"),
    ],
)
def test_what_cannot_end_in_a_verdict_is_refused_before_anything_runs(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    narrow = Backend(
        name="narrow", device_type="cpu", verified="", dtypes=(torch.float32, torch.bfloat16)
    )
    with pytest.raises(ConfigError, match=message):
        align.run(markov.config("float32"), [narrow], out_dir=tmp_path, sampler=forbidden, **wrong)


@pytest.mark.parametrize("judge", [align.record, align.bisect])
def test_a_dtype_the_backend_lacks_is_refused_before_anything_runs(judge: Any) -> None:
    narrow = Backend(name="narrow", device_type="cpu", verified="", dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match="backend narrow computes in float32; use one of these"):
        judge(markov.config("bfloat16"), narrow, sampler=forbidden)


@pytest.mark.parametrize("without", ["curve", "ops"])
def test_a_slow_part_can_be_left_out(without: str, tmp_path: Path) -> None:
    wrong = markov.backend(linear=lambda *a, **k: ops.linear.reference(*a, **k) * 1.1)
    told = list[str]()
    found = align.run(
        markov.config("float32", steps=5),
        [wrong],
        controls=4,
        without=[without],
        out_dir=tmp_path,
        sampler=markov.Markov,
        capture_steps=(2,),
        progress=lambda what, done, of: told.append(f"{what} {done}/{of}"),
    )
    [pair] = found.pairs
    assert pair.verdict == "diverged"
    assert (pair.envelope is None) == (without == "curve")
    assert bool(pair.findings) == (without == "curve")
    assert any("control" in what for what in told) == (without == "ops")
    done, of = told[-1].split()[-1].split("/")
    assert done == of
    text = report_text(found.pairs, [found.trace(pair.candidate, pair.dtype)])
    first, _, _, row, *_ = text.splitlines()
    assert row.count("  -") >= (1 if without == "curve" else 2)
    assert ("op linear " if without == "curve" else "the loss, from step ") in first
    assert "rerun: " in text
    assert "usually: " in text
    report.write(found, tmp_path / "report.html")


def forbidden() -> markov.Markov:
    raise AssertionError("a run was started")


def test_record_alone_brings_its_own_reference() -> None:
    config = markov.config("float32", steps=2)
    trace = align.record(config, markov.backend(), sampler=markov.Markov, capture_steps=(2,))
    assert trace.capture_steps == [2]
    assert trace.tests
    assert trace.control_loss.shape == (0, 2)
    reference = align.record(
        config, "reference", sampler=markov.Markov, controls=4, capture_steps=(2,)
    )
    assert reference.control_loss.shape == (4, 2)
    assert align.compare(reference, trace).verdict == "aligned"


def test_gradients_that_overwrite_those_of_the_micro_batch_before_are_found(tmp_path: Path) -> None:
    """By default a step has two micro-batches, and each op call by itself is right."""
    assert TrainConfig().global_batch == 2 * TrainConfig().micro_batch
    [fault] = [f for f in FAULTS if f.mutant == "weight_gradient_overwritten"]
    config = markov.config("float32", steps=1, micro_batch=2)
    found = align.run(
        config,
        [fault.backend()],
        without=["curve"],
        out_dir=tmp_path,
        sampler=markov.Markov,
        capture_steps=(1,),
    )
    [pair] = found.pairs
    assert pair.verdict == "diverged"
    assert not pair.findings
    assert "every op is right, but a whole step's gradients" in headline(found.pairs)
    guilty = align.bisect(config, fault.backend(), sampler=markov.Markov, capture_steps=(1,))
    assert (guilty.op, guilty.direction) == ("linear", "backward")
