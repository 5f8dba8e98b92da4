"""Rows of a bench: the noise that is noted, what a file must hold, the verdict, the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, colors

from glm_core.backends import registry
from glm_core.bench import breakdown, links, ops, page, utilisation
from glm_core.bench.breakdown import Event
from glm_core.bench.compare import Comparison, compare
from glm_core.cli import main
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.errors import GlmCoreError
from glm_core.measure import ceilings, noise, rows
from glm_core.measure.rows import Row
from glm_core.model.presets import preset
from glm_core.planner.cost import Work, model_flops

HERE = {"cpu": "Zen", "cores": 2, "threads": 2, "isa": "AVX512", "device": "cpu"}
PEAK = {"tflops": 0.1, "gb_s": 20.0, "source": "measured <here>"}


def row(key: str = "k", scale: float = 1.0, seed: int = 0, n: int = 20, **changes: Any) -> Row:
    """Returns a row of n rounds with 3 % noise of its own and 20 % shared with its peer."""
    rng = np.random.default_rng(seed)
    shared = np.exp(rng.normal(0, 0.2, n))
    own, peer = (np.exp(rng.normal(0, 0.03, n)) * shared for _ in range(2))
    facts: dict[str, Any] = {
        "bench": "ops",
        "key": key,
        "backend": "cpu",
        "dtype": "float32",
        "shape": "8",
        "seconds": tuple(own * scale * 1e-3),
        "peer": "reference",
        "peer_seconds": tuple(peer * 2e-3),
        "machine": HERE,
    }
    return Row(**facts | changes)


def verdict(a: Row, b: Row, measure: str = "auto") -> str:
    (change,) = compare([a], [b], measure).changes
    return change.verdict


def test_a_slowdown_is_seen_through_slow_spells_that_hit_the_peer_too() -> None:
    assert verdict(row(), row(scale=1.15, seed=1)) == "regression"
    assert verdict(row(), row(scale=0.85, seed=1)) == "improvement"
    both = [compare([row()], [row(seed=1)], by).changes[0] for by in ("time", "ratio")]
    widths = [c.high / c.low for c in both]
    assert widths[0] > 1.2 > widths[1]


def test_no_change_is_within_noise_for_almost_every_seed() -> None:
    calls = [verdict(row(seed=2 * i, n=12), row(seed=2 * i + 1, n=12)) for i in range(60)]
    assert sum(v != "within noise" for v in calls) <= 6


def test_a_sure_but_small_change_is_not_reported() -> None:
    quiet = tuple(1 + 1e-4 * i for i in range(20))
    a = row(seconds=quiet, peer_seconds=quiet)
    b = dataclasses.replace(a, seconds=tuple(1.02 * s for s in quiet))
    assert verdict(a, b) == "within noise"
    assert compare([a], [b], least=0.01).changes[0].verdict == "regression"


def test_level_is_shared_among_rows_and_runs_are_resampled() -> None:
    one = compare([row()], [row(seed=1)]).changes[0]
    many = compare([row(str(i)) for i in range(40)], [row(str(i), seed=1) for i in range(40)])
    assert many.changes[0].high - many.changes[0].low > one.high - one.low
    runs = [row(scale=s, seed=i) for i, s in enumerate((1.0, 1.3, 0.8))]
    spread = compare(runs, runs)
    assert spread.changes[0].low < 0.85
    assert not spread.notes


def test_other_machines_only_ratios() -> None:
    there = row(scale=9.0, machine={**HERE, "cpu": "Ice"}, peer_seconds=row().peer_seconds)
    moved = dataclasses.replace(there, peer_seconds=tuple(9 * s for s in row().peer_seconds))
    with pytest.raises(GlmCoreError, match=r"absolute times of different machines \(cpu Zen, Ice"):
        compare([row()], [moved], "time")
    found = compare([row()], [moved])
    assert found.measure == "ratio"
    assert found.changes[0].verdict == "within noise"
    assert "different machines: cpu Zen, Ice" in found.notes
    with pytest.raises(GlmCoreError, match="no peer in k"):
        compare([row(peer_seconds=())], [moved])
    with pytest.raises(GlmCoreError, match="different peers in k"):
        compare([row()], [dataclasses.replace(moved, peer="eager")])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (row("a"), row("b"), "share no row"),
        (row(n=3), row(), "3 rounds, too few"),
    ],
)
def test_what_cannot_be_compared(a: Row, b: Row, message: str) -> None:
    with pytest.raises(GlmCoreError, match=message):
        compare([a], [b])


def test_a_file_gives_back_its_rows_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    written = row(flops=2e6, bytes=1e5, peak=PEAK, notes=("busy",))
    rows.append([written], path)
    rows.append([written], path)
    assert rows.read(path) == [written, written]
    derived = json.loads(path.read_text().splitlines()[0])["derived"]
    assert derived["roof_tflops"] == min(0.1, 20 * 20 / 1e3)
    assert derived["times_faster_than_peer"] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("{", "line 1: not JSON"),
        ("[]", "lacks everything"),
        ('{"bench": "ops"}', "lacks key, backend"),
        (json.dumps(row().to_json() | {"seconds": [1, -1]}), "seconds: must be a list of positive"),
        (json.dumps(row().to_json() | {"seconds": []}), "at least one of seconds"),
        (json.dumps(row().to_json() | {"peer_seconds": [1]}), "different rounds"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(GlmCoreError, match=message):
        rows.read(path)


def test_noise_is_noted() -> None:
    begin = noise.Counters(1000, 500, 10, 100.0, 0)
    quiet = noise.Counters(2000, 1400, 10, 195.0, 0)
    assert noise.disturbances(begin, quiet) == []
    busy = noise.Counters(2000, 600, 60, 300.0, 3)
    assert noise.disturbances(begin, busy) == [
        "other processes took 65% of the CPU time",
        "the host gave 5% of the CPU time to other machines",
        "the CPU throttled 3 times",
    ]
    assert noise.irregularities([1.0] * 11 + [9.0]) == ["1 of 12 rounds above 1.1 times the median"]
    (drift,) = noise.irregularities([1 + 0.02 * i for i in range(12)])
    assert drift.startswith("+16% from the first to the last third")


def test_parts_of_a_step_sum_to_its_time() -> None:
    named = {
        "aten::mm": 4.0,
        "glm_core::attention_backward": 2.0,
        "aten::copy_": 1.0,
        "MmBackward0": 9.0,
        "c10d::allreduce_": 0.5,
        "c10d::recv_": 0.25,
        breakdown.DATA: 0.25,
        "autograd::engine::evaluate_function: MmBackward0": 9.0,
    }
    events = [Event(*item) for item in named.items()]
    expected = dict(zip(breakdown.PARTS, (4.0, 2.0, 1.0, 0.5, 0.25, 0.25, 2.0), strict=True))
    assert breakdown.shares(events, 10.0) == expected
    overlapping = breakdown.shares(events, 4.0)
    assert sum(overlapping.values()) == pytest.approx(4.0)
    assert overlapping["host"] == 0


def test_the_fastest_profiled_step_counts_and_an_untypical_one_is_noted() -> None:
    x, sizes = torch.ones(64, 64), iter([1, 40, 1, 40])
    parts = breakdown.measure(
        lambda: [x @ x for _ in range(next(sizes))], registry.get("reference"), rounds=3
    )
    assert parts["matmul"] > 0
    assert breakdown.note({"matmul": 1.0}, 1.0) == []
    assert breakdown.note({"matmul": 3.4}, 1.0) == [
        "the split is of a profiled step that took 3.4 times the median"
    ]
    with pytest.raises(StopIteration):
        next(sizes)


def test_a_step_is_measured_with_its_flops_and_parts() -> None:
    model = preset(
        "glm4-34m", num_layers=1, hidden=32, ffn=48, num_heads=2, num_kv_heads=2, vocab=64
    )
    config = RunConfig(
        model=model,
        data=DataConfig(length=16, vocab=64),
        train=TrainConfig(backend="reference", global_batch=4, micro_batch=2),
    )
    found = utilisation.measure(config, rounds=2)
    figures = found.figures
    assert figures["model_flops"] == 4 * model_flops(Work(model=model, seq=16))
    assert 0.5 < figures["hardware_flops"] / figures["model_flops"] < 2
    assert set(figures["parts_s"]) == set(breakdown.PARTS)
    assert min(figures["parts_s"][p] for p in ("matmul", "other", "data", "host")) > 0
    assert figures["mfu"] == pytest.approx(
        figures["model_flops"] / (found.median_s * found.peak["tflops"] * 1e12)
    )
    assert figures["memory_peak_bytes"] > 2**20


def test_ops_give_a_point_a_direction_and_say_what_is_left_out() -> None:
    skipped: list[str] = []
    found = list(ops.measure(["reference"], "swiglu", (torch.float32,), 2, skipped.append))
    assert [r.figures["direction"] for r in found] == ["forward", "forward_backward"]
    assert all(r.roof_tflops > 0 and r.tflops > 0 for r in found)
    assert skipped == []


def test_ceilings_have_units_and_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "sizes", lambda backend: (32, 1 << 16))
    monkeypatch.setattr(ceilings.dispatch, "CALLS", 10)
    found = {
        r.key: r for r in ceilings.measure(registry.get("reference"), (torch.float32,), rounds=2)
    }
    assert found["ceilings gemm float32"].flops == 2 * 32**3
    assert found["ceilings memory copy"].bytes == 2 * found["ceilings memory read"].bytes
    assert found["ceilings memory read"].peer == "ceilings gemm float32".removeprefix("ceilings ")
    assert found["ceilings 100 launches, queued"].figures["launch_us"] > 0
    assert found["dispatch"].peer == "bare kernel"


def test_links_become_rows() -> None:
    result = {
        "rows": [
            {
                "op": "all_reduce",
                "size_bytes": 1024,
                "type": "float",
                "seconds": [1e-3],
                "algbw_gb_s": 1.0,
                "busbw_gb_s": 1.5,
                "wrong": 0,
            }
        ],
        "ranks": 2,
        "library": "gloo",
        "backend": "reference",
        "machine": HERE,
    }
    (found,) = links.rows(result)
    assert (found.key, found.seconds) == ("comm gloo 2 ranks all_reduce 1024 B", (1e-3,))
    assert found.figures["busbw_gb_s"] == 1.5


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Writes a page with two rows under a roof, one above it, a step and a regression."""
    made = [
        row("below", flops=1e7, bytes=1e6, peak=PEAK, figures={"direction": "forward"}),
        row("above", flops=9e8, bytes=1e6, peak=PEAK, figures={"direction": "backward"}),
        row(
            "step",
            bench="step",
            figures={
                "parts_s": dict.fromkeys(breakdown.PARTS, 0.5),
                "tokens_s": 9.0,
                "mfu": 0.5,
                "hfu": 0.6,
                "memory_peak_bytes": 2**30,
                "memory_peak_of": "x",
                "formula": [utilisation.MFU],
            },
        ),
    ]
    found: Comparison = compare(
        made, [dataclasses.replace(r, seconds=tuple(2 * s for s in r.seconds)) for r in made]
    )
    return page.write(made, tmp_path / "page.html", found)


def test_page_tells_all_and_needs_no_network(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    for word in (
        "Roofline, float32: 100 GFLOP/s",
        "measured &lt;here&gt;",
        "in a cache: above",
        "bubble",
        "MFU = ",
        '<span class="bad">regression</span>',
        "AVX512",
    ):
        assert word in text
    assert not re.search(r"(?:src|href)=|url\(|@import|<script|https?://", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install chromium")
def test_chromium_shows_roof_and_points(written: Path, tmp_path: Path) -> None:
    shares = colors(written, tmp_path)
    assert shares[(255, 255, 255)] > 0.75
    assert shares[(0, 0, 0)] > 3e-4
    blue, red = (11, 92, 173), (176, 0, 32)
    assert min(shares.get(c, 0) for c in (blue, red)) > 6e-6, "points are missing"


def test_command_line_verdict_and_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    rows.append([row()], a)
    rows.append([row(scale=1.5, seed=1)], b)
    assert main(["bench", "compare", a, a]) == 0
    assert "within noise" in capsys.readouterr().out
    assert main(["bench", "compare", a, b, "--html", str(tmp_path / "c.html"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["regressions"] == 1
    assert main(["bench", "page", a, b, "--html", str(tmp_path / "p.html")]) == 0
    for wrong in (
        ["compare", a, str(tmp_path / "none")],
        ["dispatch", "--rounds", "0"],
        ["ops", "--op", "nonsense"],
        [
            "ceilings",
            "--backend",
            "null",
            "--dtype",
            "float16",
            "--no-links",
            "--least",
            "2",
            "--baseline",
            a + "x",
        ],
    ):
        assert main(["bench", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
