"""Checks the arithmetic of benches: ratios, FLOP counts, row contents. Times themselves are never
tested."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glm_core.bench import dispatch, step
from glm_core.measure import dispatch as cost
from glm_core.measure import timing
from glm_core.model.presets import preset


def test_interleave_runs_every_contestant_once_a_round_in_turn() -> None:
    order: list[str] = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = timing.interleave(contestants, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {len(t.seconds) for t in timings.values()} == {3}


def test_ratio_is_the_median_of_round_by_round_ratios() -> None:
    slow = timing.Timing(seconds=(2.0, 30.0, 6.0))
    fast = timing.Timing(seconds=(1.0, 10.0, 1.0))
    assert timing.ratio(slow, fast)["ratio"] == 3.0
    assert slow.median_s == 6.0


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert timing.Timing(seconds=(1.0,)).spread == 0.0
    assert timing.Timing(seconds=(1.0, 2.0, 3.0)).spread == pytest.approx(1.0)


def test_matmul_flops_are_six_per_weight_and_token() -> None:
    config = preset("glm4-34m")
    weights = config.num_layers * (4 * 512 * 512 + 3 * 512 * 1408) + config.vocab * config.hidden
    tokens = step.BATCH * step.LENGTH
    softmax = 3 * 4 * tokens * config.vocab  # the loss op also counts its exponentials
    assert step.matmul_flops(config) == 6 * weights * tokens + softmax


@pytest.mark.parametrize("name", step.MODELS)
def test_row_has_the_names_others_rely_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_layers": 2, "hidden": 32, "ffn": 48, "num_heads": 2, "num_kv_heads": 2}
    small = preset(name, vocab=64, **sizes)
    monkeypatch.setattr(step, "preset", lambda name: small)
    row = step.measure("float32", 2, ("eager",), backend="reference", model=name)
    assert row["ratio_eager"] > 0
    assert 0 < row["gemm_share"] < 1
    losses = row["first_loss"]
    assert losses["ours"] == pytest.approx(losses["eager"], rel=0.1)  # both start near ln(vocab)


def test_dispatch_overhead_is_the_difference_of_two_timings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock: Iterator[float] = itertools.cycle([0.03, 0.01])
    monkeypatch.setattr(cost.timeit, "timeit", lambda f, number: next(clock))
    assert dispatch.measure(rounds=2)["overhead_us"] == pytest.approx(0.02 / cost.CALLS * 1e6)


def test_gemm_contestant_has_the_dtype_and_size_it_is_counted_with() -> None:
    product = timing.gemm(torch.bfloat16, 8)()
    assert product.dtype == torch.bfloat16
    assert product.shape == (8, 8)
    assert timing.gemm_flops(8) == 1024


def test_gemm_without_a_onednn_product_is_torchs_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("could not create a primitive descriptor\nmore")

    monkeypatch.setattr(timing, "onednn_product", refuse)
    assert timing.gemm(torch.bfloat16, 8)().shape == (8, 8)
    said = "gemm torch.bfloat16: no oneDNN product on this CPU (could not create a primitive descri"
    assert said in capsys.readouterr().err


def test_a_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert timing.machine()["commit"] == "unknown"
