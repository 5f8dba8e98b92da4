"""The report is complete, self-contained and readable black on white; headless Chromium opens
it."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import numpy as np
import pytest
from chromium import CHROMIUM, colors

from glm_core.align import explanation, report
from glm_core.align.charts import Axis, Band, Series, chart
from glm_core.align.jobs import RunResult
from glm_core.align.trace import Trace
from glm_core.align.verdict import compare

STEPS, CONTROLS = 40, 6


def trace(backend: str, loss: np.ndarray, controls: np.ndarray, **changes: object) -> Trace:
    """A trace of two parameters, one captured step and one test."""
    fields: dict[str, object] = {
        "config": {
            "model": {"num_layers": 4, "hidden": 128, "vocab": 4096, "activation": "geglu"},
            "data": {"length": 16, "path": "text.txt"},
            "train": {"micro_batch": 1, "global_batch": 2, "seed": 11},
        },
        "backend": backend,
        "dtype": "float32",
        "loss": loss,
        "grad_norm": loss,
        "parameters": ["a.weight", "<b>"],
        "control_names": [f"c{i}" for i in range(len(controls))],
        "control_loss": controls,
        "capture_steps": [1],
        "gradient_norm": np.ones((1, 2)),
        "gradient_sketch": np.ones((1, 2, 4)),
        "loss_error": np.full((8, 1), 1e-7),
        "gradient_error": np.full((8, 1, 2), 1e-6),
        "disguises": [f"d{i}" for i in range(7)],
        "calls": [],
        "digest": np.zeros((0, 4)),
        "tests": [
            {
                "op": "gelu",
                "direction": "forward",
                "tensor": "y",
                "layer": "0",
                "step": 1,
                "call": 3,
                "shape": [2, 16],
                "projection": "scale",
                "dtype": "float32",
            }
        ],
        "test_values": np.array([[1e-8, 1e-8, 1e-6]]),
        "num_tests": 1,
        "fallbacks": [{"op": "rope", "reason": "no kernel <here>", "count": 4}],
        "environment": {"cpu": "Test & Co", "threads": 2},
        "data_order": "0" * 64,
        "initial_weights": "1" * 64,
        "seconds": 1.5,
    }
    return Trace(**{**fields, **changes})  # type: ignore[arg-type]  # fields of many types


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one aligned and one diverged candidate."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    loss = 8 - 3 * (1 - np.exp(-np.arange(STEPS) / 15))
    noise = 1e-6 * np.exp(rng.normal(0, 0.3, (CONTROLS, 1)) + np.arange(STEPS) / 20)
    controls = loss + noise * rng.choice([-1, 1], (CONTROLS, STEPS))
    reference = trace("reference", loss, controls)
    honest = trace("cpu", loss + 5e-7, np.zeros((0, STEPS)))
    wrong = trace(
        "broken",
        loss + 0.01 * np.arange(STEPS),
        np.zeros((0, STEPS)),
        fallbacks=[],
        test_values=np.array([[1e-2, 1e-6, 1e-6]]),
        gradient_error=np.full((8, 1, 2), 1e-6) * np.array([1e3] + [1.0] * 7)[:, None, None],
    )
    pairs = [compare(reference, honest), compare(reference, wrong)]
    traces = {f"{t.backend}-float32": t for t in (reference, honest, wrong)}
    result = RunResult(pairs=pairs, traces=traces, out_dir=folder, seconds=1.0)
    return report.write(result, folder / "report.html", "glm-core align run --steps 40")


def test_verdicts_findings_fallbacks_and_environments_are_on_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert '<span class="bad">diverged</span>' in text
    assert '<span class="good">aligned</span>' in text
    for word in (
        "envelope",
        "control runs",
        "a.weight",
        "gelu",
        "no kernel &lt;here&gt;",
        "Test &amp; Co",
    ):
        assert word in text
    assert text.count("<svg") == 6  # curves, deviation, gradients for each of the two
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


def test_the_page_and_the_terminal_begin_with_a_sentence_and_say_what_is_wrong(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    words = re.sub("<[^>]*>", "", text.partition("</h1>")[0].partition("<h1>")[2])
    assert words.startswith("1 of 2 comparisons diverged. float32 on broken: diverged; op gelu")
    assert text.index("What is wrong") < text.index("How to read it") < text.index("<svg")
    for words in (
        "op gelu, forward, layer 0, step 1; result y, float32 [2x16]",
        "too large by a common factor: 1 part in 100 (1.0e-02) of the result",
        "shows at most 1 part in 1,000,000 (1.0e-06) here",
        "--op gelu --direction forward --layer 0 --step 1",
        "a wrong factor",
        "known examples",
    ):
        assert words in text


def test_what_was_run_and_what_it_proves_are_on_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in (
        "layers 4, width 128, vocabulary 4,096, activation geglu",
        "40 steps of 2 sequences of 16 tokens, seed 11",
        "text.txt",
        "c0, c1, c2",
        f">{datetime.date.today().year}-",
        "<td>glm-core align run --steps 40</td>",
        "40 steps prove little about long training",
        "trained 6 more times",
    ):
        assert words in text
    assert text.count("What was run") == 1


def test_page_needs_no_network(page: Path) -> None:
    assert not re.search(
        r"(?:src|href)=|url\(|@import|<script|https?://", page.read_text(encoding="utf-8")
    )


def test_pair_report_without_free_run_or_teacher(tmp_path: Path) -> None:
    loss = np.linspace(8, 7, STEPS)
    reference = trace("reference", loss, loss + np.full((CONTROLS, STEPS), 1e-6))
    bare = trace(
        "cpu",
        loss,
        np.zeros((0, STEPS)),
        capture_steps=[],
        gradient_norm=np.zeros((0, 2)),
        gradient_sketch=np.zeros((0, 2, 4)),
        loss_error=np.zeros((8, 0)),
        gradient_error=np.zeros((8, 0, 2)),
        tests=[],
        test_values=np.zeros((0, 3)),
        num_tests=0,
    )
    path = report.write_pair(compare(reference, bare), reference, bare, tmp_path / "pair.html")
    text = path.read_text(encoding="utf-8")
    assert "gradients and ops were not judged.</h1>" in text
    assert "Ops were not judged" in text
    assert "No op is guilty" not in text


def test_a_page_without_the_curve_says_so_first(page: Path, tmp_path: Path) -> None:
    loss = np.linspace(8, 7, STEPS)
    reference = trace("reference", loss, np.zeros((0, STEPS)))
    candidate = trace("cpu", np.zeros(0), np.zeros((0, 0)))
    pair = compare(reference, candidate)
    assert pair.envelope is None
    text = report.write_pair(pair, reference, candidate, tmp_path / "p.html").read_text("utf-8")
    assert "the curve was not judged.</h1>" in text
    assert "trained 0 more times" not in text
    assert "prove little" not in text
    assert "was not judged" not in page.read_text(encoding="utf-8").partition("</h1>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install chromium")
def test_chromium_renders_it_black_on_white(page: Path, tmp_path: Path) -> None:
    shares = colors(page, tmp_path)
    assert shares[(255, 255, 255)] > 0.75
    assert shares[(0, 0, 0)] > 3e-4
    blue, red, grey = (11, 92, 173), (176, 0, 32), (221, 221, 221)
    assert min(shares.get(c, 0) for c in (blue, red, grey)) > 6e-6, "a curve is missing"


def test_chart_leaves_gaps_for_what_cannot_be_drawn() -> None:
    values = [1.0, 2.0, float("nan"), 0.0, 10.0, 20.0]
    figure = chart("t", [Series("s", range(6), values, "#123456")], log=True)
    (path,) = re.findall(r'<path d="([^"]*)" fill="none" stroke="#123456"', figure)
    assert path.count("M") == 2  # the pen was lifted once
    assert path.count("L") == 3
    assert "NaN" not in figure


def test_what_the_legend_lists_is_drawn() -> None:
    """A distance of 0 lies on a line of its own, below all others; what is left out is said."""
    lines = [
        Series("bound", [1, 2], [1e-6, 1e-5], "#abcdef"),
        Series("same bits", [1, 2], [0.0, 0.0], "#123456"),
        Series("nothing", [1, 2], [float("nan")] * 2, "#654321"),
    ]
    figure = chart("t", lines, log=True)
    heights = {
        color: re.findall(r"[ML][\d.]+ ([\d.]+)", path)
        for path, color in re.findall(r'<path d="([^"]*)" fill="none" stroke="(#\w{6})"', figure)
    }
    assert heights["#123456"] == ["220.0", "220.0"]
    assert float(heights["#abcdef"][0]) < 219
    assert ">0</text>" in figure
    assert "nothing (no finite value)" in figure
    assert "same bits</span>" in figure


def test_axis_ticks_are_round_and_inside() -> None:
    assert Axis([0.0, 10.0], 0, 100).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis([3e-5, 0.2], 0, 100, log=True).ticks() == pytest.approx(
        [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    )
    assert Axis([5.0, 5.0], 0, 100).pixel(5.0) == 50


def test_band_is_drawn_between_its_curves() -> None:
    figure = chart("t", [], [Band("b", [0, 1], [0.0, 0.0], [1.0, 2.0])])
    assert figure.count("<polygon") == 1


def test_the_sentence_gives_the_ratio_of_the_finding_that_it_names() -> None:
    """The backward is further off, since the wrong forward spoils it; the forward is named."""
    wave = np.linspace(5, 4, STEPS)
    controls = wave + 1e-6 * np.sin(np.arange(CONTROLS * STEPS).reshape(CONTROLS, STEPS))
    [forward] = trace("reference", wave, controls).tests
    size = {**forward, "projection": "size"}
    backward = {**size, "direction": "backward", "tensor": "d_x"}
    values = np.array([[3e-6, 0.0, 1e-6], [5e-4, 0.0, 1e-6]])
    candidate = trace("cpu", wave, controls[:0], tests=[size, backward], test_values=values)
    pair = compare(trace("reference", wave, controls), candidate)
    assert pair.max_op_ratio == pytest.approx(500)
    assert "op gelu forward in layer 0 deviates 3.00 times" in explanation.sentence(pair)
