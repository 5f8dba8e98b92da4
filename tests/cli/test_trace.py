"""`glm-core trace` shows what a file holds, without torch, and which ops fell back at which
cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.align import fallbacks
from glm_core.align.trace import Trace
from glm_core.backends.base import Backend
from glm_core.cli import main
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from glm_core.data.open import open_sampler
from glm_core.data.sampler import Batch, Sampler
from glm_core.spec import SUPPORTED, Support, unsupported

SIZES = {"num_layers": 2, "hidden": 32, "num_heads": 2, "ffn": 64, "vocab": 300, "max_length": 32}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Returns the config of two DeepNorm layers on a text of a few pages."""
    import pydoc_data.topics as t

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(t.topics.values())[:20]), encoding="utf-8")
    return RunConfig(
        model=ModelConfig(**SIZES),  # type: ignore[arg-type]  # keyword values of several types
        data=DataConfig(path=str(path), vocab=300, length=32),
        train=TrainConfig(backend="reference", steps=4, micro_batch=2, global_batch=4),
    )


def measured(config: RunConfig, backend: Backend) -> fallbacks.Fallbacks:
    cache = Path(config.data.path).parent
    return fallbacks.measure(config, open_sampler(config.data, 0, cache), backend)


class Counting(Backend):
    """A runtime that counts the calls that it sends to the host."""

    sent = 0

    def runtime_fallbacks(self) -> dict[str, int]:
        return {"aten::bmm": self.sent}


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Support:
    return SUPPORTED if weight.shape[0] < 96 else unsupported(f"{weight.shape[0]} rows, at most 95")


def port() -> Counting:
    """Kernels for linear (small ones) and geglu; geglu calls the host twice behind our back."""
    backend = Counting(name="port", device_type="cpu", verified="nowhere")

    @backend.implements(ops.linear, supports=few_rows)
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    @backend.implements(ops.geglu)
    def geglu(x: Tensor) -> Tensor:
        backend.sent += 2
        return ops.geglu.reference(x)

    return backend


def test_fallbacks_are_counted_explained_and_priced(config: RunConfig) -> None:
    report = measured(config, port())
    rows = {(r.op, r.where): r for r in report.rows}
    # 2 micro-batches x 2 layers; qkv (96 rows) and up (128 rows) are refused, out and down are not
    refused = [r for r in report.rows if r.op == "linear"]
    assert {r.reason: r.calls for r in refused} == {
        "96 rows, at most 95": 4,
        "128 rows, at most 95": 4,
    }
    assert rows["attention", "reference"].reason == "no kernel for this op"
    assert rows["attention", "reference"].calls == 4
    assert rows["adamw", "reference"].calls == 2
    assert ("geglu", "reference") not in rows
    host = rows["geglu", "host"]
    assert host.calls == 4
    assert host.reason == "the runtime sent aten::bmm there, 2 times per call"
    assert report.runtime_counted
    shares = {r.reason: r.flops_share or 0.0 for r in refused}
    narrow, wide = shares["96 rows, at most 95"], shares["128 rows, at most 95"]
    assert narrow / wide == pytest.approx(96 / 128, rel=0.02)  # both have 32 columns
    total = sum(f for _, f in fallbacks.step_flops(config).values())  # attention to all pairs
    assert wide == pytest.approx(4 * 3 * 2 * (2 * 32) * 32 * 128 / total, rel=0.1)


def test_shares_add_up_where_nothing_has_a_kernel(config: RunConfig) -> None:
    report = measured(config, Backend(name="bare", device_type="cpu", verified="nowhere"))
    assert math.fsum(r.flops_share or 0.0 for r in report.rows) == pytest.approx(1)
    assert math.fsum(r.time_share or 0.0 for r in report.rows) == pytest.approx(1)
    assert [r.flops_share for r in report.rows] == sorted(
        (r.flops_share for r in report.rows), key=lambda x: -(x or 0.0)
    )


def test_slow_kernel_costs_time_not_flops(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # a tick a look; the slow kernel looks often
    monkeypatch.setattr(fallbacks.time, "perf_counter", lambda: next(clock))
    backend = Counting(name="slow", device_type="cpu", verified="nowhere")

    @backend.implements(ops.geglu)
    def geglu(x: Tensor) -> Tensor:
        backend.sent += 1
        for _ in range(1000):
            next(clock)
        return ops.geglu.reference(x)

    [row] = [r for r in measured(config, backend).rows if r.where == "host"]
    assert row.flops_share is not None
    assert row.flops_share < 0.1
    assert row.time_share is not None
    assert row.time_share > 0.9


def test_host_calls_outside_the_ops_are_listed_too(config: RunConfig) -> None:
    backend = Counting(name="between", device_type="cpu", verified="nowhere")

    class Feeding(Sampler):
        def next(self, micro_batch: int) -> Batch:
            backend.sent += 3
            return super().next(micro_batch)

    sampler = open_sampler(config.data, 0, Path(config.data.path).parent)
    sampler.__class__ = Feeding
    report = fallbacks.measure(config, sampler, backend)
    [row] = [r for r in report.rows if r.where == "host"]
    assert (row.op, row.reason) == (fallbacks.OUTSIDE, "the runtime sent aten::bmm there")
    assert row.calls == 6  # two micro-batches
    assert row.flops_share is row.time_share is None


def test_what_is_not_counted_is_said(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = "what its runtime sends to the host is not known"
    for kind, expected in (("npu", True), ("cpu", False)):
        t = dataclasses.replace(trace(config, []), environment={"device_type": kind})
        t.save(tmp_path / kind)
        assert main(["trace", "fallbacks", str(tmp_path / kind)]) == 0
        out = capsys.readouterr().out
        assert ("no fallback" in out, unknown in out) == (True, expected)


def trace(config: RunConfig, rows: list[dict[str, object]]) -> Trace:
    """Returns the trace of a run without controls and teacher forcing."""
    n = config.train.steps
    return Trace(
        config=to_dict(config),
        backend="port",
        dtype="float32",
        loss=np.linspace(5, 4, n),
        grad_norm=np.ones(n),
        control_names=[],
        control_loss=np.zeros((0, n)),
        capture_steps=[],
        parameters=["a", "b"],
        gradient_norm=np.zeros((0, 2)),
        gradient_sketch=np.zeros((0, 2, 8)),
        loss_error=np.zeros((1, 0)),
        gradient_error=np.zeros((1, 0, 2)),
        disguises=[],
        calls=[],
        digest=np.zeros((0, 8)),
        tests=[],
        test_values=np.zeros((0, 3)),
        num_tests=0,
        fallbacks=rows,
        environment={"cpu": "this one"},
        data_order="d",
        initial_weights="w",
        seconds=1.25,
    )


def test_a_trace_tells_the_same_counts_and_flops(config: RunConfig, tmp_path: Path) -> None:
    live = measured(config, Backend(name="bare", device_type="cpu", verified="nowhere"))
    rows: list[dict[str, object]] = [
        {"op": r.op, "reason": r.reason, "count": int(r.calls) * config.train.steps}
        for r in live.rows
    ]
    recorded = {r.op: r for r in fallbacks.recorded(trace(config, rows)).rows}
    assert {op: r.calls for op, r in recorded.items()} == {r.op: r.calls for r in live.rows}
    mine = {r.op: r.flops_share or 0.0 for r in live.rows}
    for op in mine.keys() - {"attention"}:  # of which a trace assumes all pairs
        ratio = (recorded[op].flops_share or 0.0) / (recorded["linear"].flops_share or 0.0)
        assert ratio == pytest.approx(mine[op] / mine["linear"], rel=1e-9), op
    assert mine["attention"] < (recorded["attention"].flops_share or 0.0) < 3 * mine["attention"]


def test_fallbacks_of_a_file_and_of_a_backend(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "port.trace"
    trace(config, [{"op": "rope", "reason": "no kernel for this op", "count": 8}]).save(path)
    assert main(["trace", "fallbacks", str(path)]) == 0
    assert "rope  reference  2" in capsys.readouterr().out
    heads = {"num_kv_heads": 2, "head_dim": 16}
    sizes = [f"--set=model.{k}={v}" for k, v in {**SIZES, **heads}.items()]
    options = [*sizes, "--set=data.vocab=300", "--set=data.length=32", "--data", config.data.path]
    assert main(["trace", "fallbacks", "--backend", "reference", *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == []
    assert facts["step_ms"] > 0


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["show", "none.trace"], 2, "none.trace: cannot be read"),
        (["fallbacks"], 2, "give one of them"),
        (["fallbacks", "x", "--backend", "cpu"], 2, "give one of them"),
        (["fallbacks", "--backend", "cpx"], 2, "did you mean cpu?"),
        (["fallbacks", "--backend", "reference:nosuch"], 3, "is not available here"),
        (["fallbacks", "none.trace"], 2, "none.trace: cannot be read"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else None,
)
def test_bad_input_is_one_line(
    argv: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", *argv]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err


def test_show_needs_no_torch(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "port.trace"
    trace(config, []).save(path)
    code = (
        "import sys; from glm_core.cli import main\n"
        f"assert main(['trace', 'show', {str(path)!r}, '--json']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["steps"], facts["first_loss"], facts["last_loss"]) == (4, 5.0, 4.0)
    assert facts["config"]["model"]["hidden"] == 32
