"""align.bisect names the guilty op, direction, dtype, shape and layer, and a command that reruns
it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markov
import pytest
import torch
from small_runs import rows

from glm_core import align, ops
from glm_core.align import explanation, substitution
from glm_core.align.bisection import Evidence
from glm_core.align.training import Run
from glm_core.backends.base import Backend
from glm_core.cli import main
from glm_core.config import RunConfig
from glm_core.errors import ConfigError
from glm_core.faults.kernels import backward_only, changed, edited, forward_only
from glm_core.sensitivity import hitrate

GEGLU = ops.geglu


@functools.cache
def evidence(dtype: str = "float32") -> Evidence:
    """Returns what the calibration captured of step 3: every op and shape is in one step."""
    known = markov.calibration(dtype)  # type: ignore[arg-type]  # a parameter, any string
    calls = [c for c in known.cases if c.call.step == 3]
    return Evidence(known.snapshots[:1], calls, known.limits)


def bisect(backend: Backend, dtype: str = "float32", **rest: Any) -> align.Bisection:
    given = {"sampler": markov.Markov, "evidence": evidence(dtype)} | rest
    config = markov.config(dtype, steps=4)  # type: ignore[arg-type]  # a parameter, any string
    return align.bisect(config, backend, **given)  # type: ignore[arg-type]  # keywords of any type


def scaled(factor: float) -> Callable[..., Any]:
    return lambda **a: GEGLU.reference(**a) * factor


def backend(op: str, kernel: Callable[..., Any]) -> Backend:
    """A backend of references, except for this op, whose kernel takes its arguments by name."""
    spec = ops.all_ops()[op]

    def positional(*args: Any, **kwargs: Any) -> Any:
        return kernel(**dict(zip(spec.parameters, args, strict=False)) | kwargs)

    return markov.backend(**{op: positional})


NORM = ops.add_layer_norm
WRONG = {
    "both": ("geglu", scaled(1.01), "forward", "y"),
    "forward": ("geglu", forward_only(GEGLU, scaled(1.01)), "forward", "y"),
    "backward": ("geglu", backward_only(GEGLU, scaled(1.01)), "backward", "d_x"),
    "one gradient of several": (
        "add_layer_norm",
        edited(NORM, lambda a, found: {"residual": found["residual"] * 1.01}),
        "backward",
        "d_residual",
    ),
    "mask": (
        "attention",
        changed(ops.attention, key_end=lambda a: a["key_end"] + 1),
        "forward",
        "y",
    ),
    "optimizer": ("adamw", changed(ops.adamw, eps=1e-3), "optimizer", ""),
    "clip": (
        "global_norm",
        changed(ops.global_norm, tensors=lambda a: a["tensors"][1:]),
        "optimizer",
        "",
    ),
}


@functools.cache
def bisected(kind: str, dtype: str) -> align.Bisection:
    """Returns what is named where this kernel of WRONG computes."""
    op, kernel, *_ = WRONG[kind]
    return bisect(backend(op, kernel), dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in WRONG), ("both", "bfloat16"), ("optimizer", "bfloat16")],
)
def test_op_and_direction_are_named(kind: str, dtype: str) -> None:
    op, _, direction, tensor = WRONG[kind]
    found = bisected(kind, dtype)
    assert (found.op, found.direction, found.how) == (op, direction, "op by op")
    assert found.dtype == ("float32" if direction == "optimizer" else dtype)
    assert tensor in found.finding
    assert found.shape or direction == "optimizer"
    assert f"conformance --backend candidate --id {op}-" in found.rerun
    assert found.rerun.endswith({"backward": "-grad"}.get(direction, "-test"))
    if direction != "optimizer" and dtype == "float32":
        assert found.substitution["substituted"] == 0.0 < found.substitution["candidate"]


def test_the_layer_is_named_where_only_one_is_wrong() -> None:
    mine = [c.call for c in evidence().cases if (c.call.op, c.call.layer) == (GEGLU, "1")]
    seen = {float(call.args["x"].detach().sum()) for call in mine}
    assert len(seen) == 1

    def second_layer(**a: Any) -> Any:
        return scaled(1.01 if float(a["x"].detach().sum()) in seen else 1.0)(**a)

    found = bisect(backend("geglu", second_layer))
    assert (found.op, found.layer) == ("geglu", "1")
    assert "--layer 1" in found.rerun


def test_what_conformance_does_not_show_is_rerun_as_the_captured_call() -> None:
    def only_here(**a: Any) -> Any:
        return scaled(1.01 if a["x"].shape[-1] == 128 else 1.0)(**a)

    found = bisect(backend("geglu", only_here))
    words = shlex.split(found.rerun)
    assert words[:3] == ["glm-core", "align", "bisect"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--backend"] == "candidate"
    only = align.CallFilter(
        given["--op"], given["--direction"], given["--layer"], int(given["--step"])
    )
    assert only == align.CallFilter("geglu", "forward", found.layer, found.step)
    again = bisect(backend("geglu", only_here), only=only, evidence=None, capture_steps=(3,))
    assert (again.op, again.layer, again.step) == ("geglu", found.layer, found.step)
    other = dataclasses.replace(only, direction="backward", op="attention")
    innocent = bisect(backend("geglu", only_here), only=other)
    assert not innocent.guilty
    assert "nothing guilty in --op attention --direction backward" in innocent.text()


def test_a_call_that_is_not_there_is_refused() -> None:
    only = align.CallFilter("geglu", layer="7")
    with pytest.raises(ConfigError, match=r"no captured call fits --op geglu --layer 7.*adamw"):
        bisect(markov.backend(), only=only, evidence=None, capture_steps=(1,))
    late = align.CallFilter(step=99)
    with pytest.raises(ConfigError, match=r"--step 99: the run has \d+; choose one of \(1,\)"):
        bisect(markov.backend(), only=late, evidence=None, capture_steps=(1,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_named_where_nothing_is_wrong(dtype: str) -> None:
    found = bisect(markov.backend(), dtype)
    assert not found.guilty
    assert (found.op, found.rerun) == ("", "")
    assert "nothing guilty" in found.text()


def test_what_happens_once_is_named_in_its_own_run() -> None:
    calls = 0

    def once(**a: Any) -> Any:
        nonlocal calls
        calls += 1  # 2 captured calls twice, then the third step's second
        return scaled(1.5 if calls == 2 * 2 + 6 else 1.0)(**a)

    found = bisect(backend("geglu", once))
    assert (found.op, found.direction, found.layer, found.step) == ("geglu", "forward", "1", 3)
    assert found.how == "in its own run"
    assert "the fault happened once" in found.text()
    assert "--op" not in found.rerun


@pytest.mark.parametrize("at", [0, 6])
def test_a_run_and_its_bisection_agree_on_what_happens_once(at: int) -> None:
    calls = 0

    def once(**a: Any) -> Any:
        nonlocal calls
        calls += 1
        return scaled(1.5 if calls == at else 1.0)(**a)

    cal = markov.calibration("float32")
    trace = align.record(cal.config, backend("geglu", once), calibration=cal)
    pair = align.compare(cal.reference, trace)
    if not at:
        assert pair.verdict == "aligned"
        return
    found = pair.findings[0]
    assert (found.op, found.layer, found.step) == ("geglu", "1", 3)
    assert "--op" not in explanation.rerun(pair, trace)


def test_what_is_wrong_outside_of_ops_is_no_ops_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Run.backward

    def wrong(self: Run, batches: Any) -> torch.Tensor:
        loss = right(self, batches)
        if self.backend.name == "candidate":
            for p in self.model.parameters():
                p.grad *= 1.01  # type: ignore[operator]  # never None here
        return loss

    monkeypatch.setattr(Run, "backward", wrong)
    found = bisect(markov.backend())
    assert found.op.startswith("outside ops: gradients are wrong with every op's reference in")
    assert "rotary tables, residual sums" in found.op
    assert (found.direction, found.how) == ("", "by substitution in a whole step")


@pytest.mark.parametrize(
    ("kernel", "direction", "layer"),
    [(scaled(1.01), "forward", ""), (backward_only(GEGLU, scaled(1.01)), "backward", "")],
    ids=["forward", "backward"],
)
def test_substitution_finds_what_heals_a_whole_step(
    kernel: Callable[..., Any], direction: str, layer: str
) -> None:
    cal, candidate = markov.calibration("float32"), backend("geglu", kernel)
    trace = align.record(cal.config, candidate, calibration=cal, free_run=False)
    told: list[str] = []
    found = substitution.search(cal, trace, candidate, lambda what, done, of: told.append(what))
    assert (found["op"], found["direction"], found["layer"]) == ("geglu", direction, layer)
    assert told


def raising(direction: str) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("128 bytes wanted")

    return fail if direction == "forward" else edited(GEGLU, lambda a, g: fail())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_that_fails_is_named_by_its_error(direction: str) -> None:
    kernel = raising(direction)
    made = backend("geglu", kernel if direction == "backward" else lambda **a: kernel())
    found = bisect(made)
    assert (found.op, found.direction, found.layer) == ("geglu", direction, "0")
    assert (found.how, found.dtype) == ("by its error", "float32")
    assert "OutOfMemoryError: 128 bytes wanted; use a smaller train.micro_batch" in found.finding
    assert found.rerun.endswith(f"--op geglu --direction {direction} --layer 0 --step 3")


def test_the_json_has_the_names_others_rely_on() -> None:
    plain = json.loads(json.dumps(bisected("both", "float32").to_json(), allow_nan=False))
    names = {"op", "direction", "dtype", "shape", "layer", "rerun", "seconds"}
    assert names <= set(plain)
    assert plain["shape"] == [4, 32, 64]


def test_hits_compares_what_was_planted_with_what_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hitrate, "draw", lambda run, cache_dir: rows(run))
    names = ["swiglu-halves-swapped", "adamw-beta2-0.999"]
    found = hitrate.hits("float32", steps=1, names=names, processes=1)
    assert [(r.op, r.direction, r.rerun) for r in found.rows] == [
        ("swiglu", "forward", "conformance"),
        ("adamw", "optimizer", "conformance"),
    ]
    assert (found.share, found.to_json()["missed"]) == (1.0, [])
    lost = [dataclasses.replace(found.rows[0], op=""), found.rows[1]]
    wrong = hitrate.Hits(dtype="float32", rows=[*lost, dataclasses.replace(lost[1], direction="")])
    assert wrong.share == pytest.approx(2 / 3)
    assert wrong.to_json()["missed"] == ["swiglu-halves-swapped"]
    assert "swiglu-halves-swapped: planted swiglu forward; named forward" in wrong.text()
    with pytest.raises(ConfigError, match="unknown float32 bug 'geglu-tan'"):
        hitrate.hits("float32", names=["geglu-tan"])


SMALL = ["--steps", "2", "--set", "model.num_layers=1", "--set", "model.hidden=32"]
TEXT = ["--set", "model.vocab=320", "--set", "data.vocab=320", "--set", "data.length=32"]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pydoc_data.topics as t

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(list(t.topics.values())[:20]), encoding="utf-8")
    run = ["align", "bisect", *SMALL, *TEXT, "--data", str(text)]
    small = [*run, "--set", "train.global_batch=2", "--set", "train.micro_batch=2"]
    assert main([*small, "--backend", "reference:cpu", "--op", "geglu", "--step", "1"]) == 0
    assert "nothing guilty in --op geglu --step 1" in capsys.readouterr().out
    assert main([*small, "--backend", "reference:cpu", "--op", "gelgu"]) == 2
    assert "did you mean gelu?" in capsys.readouterr().err
    assert main([*small, "--backend", "reference:nowhere"]) == 3


@pytest.mark.parametrize("config", [align.main_job(), RunConfig(), markov.config("float32")])
def test_the_rerun_command_gives_the_config_again(config: RunConfig) -> None:
    """Also where a field is at its own default and not at the main job's."""
    from glm_core.align import rerun_command
    from glm_core.cli import parser
    from glm_core.cli.align import config_of

    words = rerun_command.command(config, "cpu")
    args = parser().parse_args(words[1:])
    assert config_of(args, backend=config.train.backend, dtype=args.dtype) == config
    assert config != align.main_job() or "--set" not in words


def test_the_rerun_command_spells_the_run_out() -> None:
    from glm_core.align import rerun_command

    config: RunConfig = markov.config("bfloat16")
    words = rerun_command.command(config, "candidate")
    assert words[-4:] == ["--backend", "candidate", "--dtype", "bfloat16"]
    assert {"model.hidden=32", "train.lr=0.003", "data.vocab=64"} <= set(words)
    assert not any("train.backend" in w for w in words)
