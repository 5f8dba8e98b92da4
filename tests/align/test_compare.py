"""The verdict needs only traces: what diverges, what cannot be compared, and that torch is not
loaded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import markov
import numpy as np
import pytest
import torch

from glm_core import align, ops
from glm_core.align import explanation
from glm_core.align.trace import Trace, load
from glm_core.align.training import moved
from glm_core.errors import TraceError
from glm_core.faults.museum.training import low_masters


@pytest.fixture(scope="module")
def honest() -> Trace:
    """A backend of references whose linear layer sums in two parts."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        half = x.shape[-1] // 2
        y = x[..., :half] @ weight[:, :half].mT + x[..., half:] @ weight[:, half:].mT
        return y if bias is None else y + bias

    return recorded(linear=linear)


def recorded(**kernels: Any) -> Trace:
    cal = markov.calibration("float32")
    return align.record(markov.config("float32"), markov.backend(**kernels), calibration=cal)


def reference() -> Trace:
    return markov.calibration("float32").reference


def changed(trace: Trace, **fields: Any) -> Trace:
    return dataclasses.replace(trace, **fields)


def test_an_honest_run_is_aligned(honest: Trace) -> None:
    pair = align.compare(reference(), honest)
    assert (pair.verdict, pair.reasons, pair.findings, pair.first_step) == ("aligned", [], [], None)
    assert 0 < pair.max_envelope_ratio < 1
    assert 0 < pair.max_gradient_ratio < 1
    assert 0 < pair.max_op_ratio < 1
    assert 0.1 < np.median(pair.gradient_ratio) < 3
    assert "identical" not in explanation.sentence(pair)


def test_curves_with_the_same_bits_are_called_identical(honest: Trace) -> None:
    pair = align.compare(reference(), changed(honest, loss=reference().loss))
    assert "aligned; the curves are identical, every loss to the bit;" in explanation.sentence(pair)


def test_a_bug_is_seen_by_all_three_ways_and_named() -> None:
    def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return a * torch.nn.functional.gelu(3 * b, approximate="tanh") / 3

    pair = align.compare(reference(), recorded(geglu=gelu_tanh))
    assert pair.verdict == "diverged"
    assert pair.first_step is not None
    assert min(pair.max_envelope_ratio, pair.max_gradient_ratio, pair.max_op_ratio) > 1
    assert pair.reasons[0].startswith(f"step {pair.first_step}: the loss deviates by")
    assert "the gradient of" in pair.reasons[1]
    assert pair.reasons[-1].startswith("op geglu ")
    assert {f.op for f in pair.findings} == {"geglu"}


def test_an_optimizer_bug_leaves_gradients_alone() -> None:
    def adamw(*args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(ops.adamw.parameters, args, strict=False)), **kwargs}
        ops.adamw.reference(**{**named, "beta1": 0.8})

    pair = align.compare(reference(), recorded(adamw=adamw))
    assert pair.verdict == "diverged"
    assert pair.max_gradient_ratio < 1
    assert {f.op for f in pair.findings} == {"adamw"}


def test_masters_in_a_lower_precision_are_seen_between_two_updates() -> None:
    """Every op is right, and the curve of a few steps is too."""
    cal, run = markov.calibration("float32"), markov.config("float32")
    with low_masters():
        candidate = align.record(run, "reference", calibration=cal, teacher_forcing=False)
    pair = align.compare(cal.reference, candidate)
    [state] = pair.findings
    assert (state.op, state.tensor, state.step) == ("adamw", "params", 2)
    assert 1e-4 < state.effect < 2**-8
    assert "the optimizer's state between two updates, deviates" in explanation.sentence(pair)
    facts = dict(explanation.details(pair, candidate))
    assert facts["rerun"].startswith("glm-core align run ")
    assert "lower precision" in facts["usually"]


def test_a_run_that_broke_off_diverges(honest: Trace) -> None:
    loss = honest.loss.copy()
    loss[7:] = np.nan
    pair = align.compare(reference(), changed(honest, loss=loss))
    assert (pair.verdict, pair.first_step) == ("diverged", 8)
    assert "broke off" in pair.reasons[0]
    assert json.loads(json.dumps(pair.to_json(), allow_nan=False))["max_envelope_ratio"] == 1e30


def test_either_half_alone_is_enough(honest: Trace) -> None:
    n = len(honest.disguises) + 1
    curve_only = changed(
        honest,
        capture_steps=[],
        gradient_norm=honest.gradient_norm[:0],
        gradient_sketch=honest.gradient_sketch[:0],
        loss_error=np.zeros((n, 0)),
        gradient_error=np.zeros((n, 0, len(honest.parameters))),
        calls=[],
        digest=honest.digest[:0],
        tests=[],
        test_values=honest.test_values[:0],
        num_tests=0,
    )
    empty = np.zeros(0)
    taught_only = changed(honest, loss=empty, grad_norm=empty, control_loss=np.zeros((0, 0)))
    assert align.compare(reference(), curve_only).max_op_ratio == 0.0
    assert align.compare(reference(), taught_only).max_envelope_ratio == 0.0
    nothing = changed(curve_only, loss=empty, grad_norm=empty, control_loss=np.zeros((0, 0)))
    with pytest.raises(TraceError, match="neither a free run nor teacher forcing"):
        align.compare(reference(), nothing)


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'float32' in the reference"),
        ({"initial_weights": "0"}, "initial_weights is"),
        ({"data_order": "0"}, "data_order is"),
    ],
)
def test_traces_of_different_runs_are_refused(
    honest: Trace, fields: dict[str, Any], fact: str
) -> None:
    with pytest.raises(TraceError, match=fact):
        align.compare(reference(), changed(honest, **fields))


def test_a_reference_without_controls_is_refused(honest: Trace) -> None:
    with pytest.raises(TraceError, match="controls=6"):
        align.compare(honest, honest)


def test_another_micro_batch_is_the_same_run() -> None:
    cal = markov.calibration("float32")
    trace = align.record(markov.config("float32", micro_batch=2), "reference", calibration=cal)
    pair = align.compare(cal.reference, trace)
    assert pair.verdict == "aligned", pair.reasons
    assert pair.max_envelope_ratio > 0
    assert trace.data_order == cal.reference.data_order


def test_another_config_is_not() -> None:
    cal = markov.calibration("float32")
    with pytest.raises(TraceError, match="differs from the calibration's"):
        align.record(markov.config("float32", steps=13), "reference", calibration=cal)


def test_moving_by_one_ulp_moves_every_weight_by_one_ulp() -> None:
    w = {"w": torch.tensor([1.0, -1.0, 0.0, 1e-30])}
    up = torch.nextafter(w["w"], torch.full((4,), torch.inf))
    down = torch.nextafter(w["w"], torch.full((4,), -torch.inf))
    there = moved(w, 0)["w"]
    assert ((there == up) | (there == down)).all()
    assert not torch.equal(moved(w, 1)["w"], there) or not torch.equal(moved(w, 2)["w"], there)


def test_the_verdict_needs_files_only(honest: Trace, tmp_path: Path) -> None:
    reference().save(tmp_path / "reference.trace")
    honest.save(tmp_path / "candidate.trace")
    program = (
        "import sys\n"
        "from glm_core import align\n"
        "from glm_core.align.trace import load\n"
        "pair = align.compare(load(sys.argv[1]), load(sys.argv[2]))\n"
        "print(pair.verdict, 'torch' in sys.modules)"
    )
    files = [str(tmp_path / f"{side}.trace") for side in ("reference", "candidate")]
    out = subprocess.run(
        [sys.executable, "-c", program, *files],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(align.__file__).parents[2],
    )
    assert out.stdout.split() == ["aligned", "False"]


def test_a_saved_trace_is_the_same_trace(honest: Trace, tmp_path: Path) -> None:
    honest.save(tmp_path / "a.trace")
    again = load(tmp_path / "a.trace")
    for field in dataclasses.fields(Trace):
        one, other = getattr(honest, field.name), getattr(again, field.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    assert (tmp_path / "a.trace").stat().st_size < 1_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["a.trace"]


def test_a_digest_shows_what_differs(honest: Trace) -> None:
    def rope(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> Any:
        return ops.rope.reference(x, cos, -sin, interleaved)

    wrong = recorded(rope=rope)
    assert [c["op"] for c in wrong.calls] == [c["op"] for c in honest.calls]
    differs = np.abs(wrong.digest - honest.digest).max(1) > 1e-3 * np.abs(honest.digest).max(1)
    assert {c["op"] for c, d in zip(wrong.calls, differs, strict=True) if d} == {"rope"}
