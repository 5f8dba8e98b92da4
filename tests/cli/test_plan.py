"""`glm-core plan` has the right exit codes, JSON keys and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm_core.cli import main
from glm_core.planner.formulas import FORMULAS


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_search_gives_plans_with_memory_and_time_by_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--preset", "glm-10b", "--chip", "A100-80G", "--chips", "16", "--top", "2"]
    what = ["--tokens", "1e9", "--global-batch", "256", "--seq", "1024"]
    facts = run_json(capsys, *where, *what)
    first, second = facts["plans"]
    assert first["step_s"] <= second["step_s"]
    assert sum(first["memory_bytes"].values()) == pytest.approx(first["peak_bytes"])
    assert sum(first["step_parts_s"].values()) == pytest.approx(first["step_s"])
    assert first["tp"] * first["pp"] * first["dp"] == 16
    assert len(facts["stages"]) == first["pp"]
    seconds = 1e9 / (256 * 1024) * first["step_s"]
    assert first["days"] == pytest.approx(seconds / 86400)
    assert first["energy_mwh"] == pytest.approx(16 * 400 * seconds / 3.6e9)
    assert facts["rejected"]


def test_what_cannot_fit_exits_1_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--tp", "4", "--pp", "8", "--micro-batch", "8", "--recompute", "none"])
    text = capsys.readouterr().out
    assert code == 1
    assert "0 plans fit" in text
    assert "GB a chip, " in text
    assert "nearest that fits:\nplan" in text


def test_explain_gives_every_formula_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "tiny", "--chip", "CPU", "--chips", "1", "--global-batch", "8"]
    assert main(["plan", *arguments, "--seq", "128", "--tokens", "1e6", "--explain"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: {formula}  [{source}]" in text for name, formula, source in FORMULAS)


def test_validate_has_the_names_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "validate")
    names = {"source", "model", "chips", "predicted_step_s", "reported_step_s", "error", "held_out"}
    assert all(names <= set(row) for row in facts["rows"])
    assert facts["median_abs_error_held_out"] <= 0.1
    assert main(["plan", "validate"]) == 0
    text = capsys.readouterr().out
    assert "A100: median |error|" in text
    assert "not predicted: Pangu Ultra" in text


def test_slides_stand_beside_what_they_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "slides"]) == 0
    text = capsys.readouterr().out
    for share in ("41.06%", "31.29%", "18.39%", "33.00%"):
        assert share in text
    assert "days = 8 N T" in text


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--chip", "A1000"], "unknown chip 'A1000'"),
        (["--chips", "0"], "chips=0 must be positive"),
        (["--tokens", "-1"], "--tokens=-1.0 must be positive"),
        (["--preset", "glm-131b"], "unknown preset 'glm-131b'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert fact in error
    assert error.count("\n") == 1


def test_a_cluster_file_without_units_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"chip": "A100-40G", "chips": 8, "link_between_nodes": 25}))
    assert main(["plan", "--cluster", str(path)]) == 2
    assert "link_between_nodes=25 needs a number and its unit" in capsys.readouterr().err


def test_int4_is_what_small_cards_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "inference", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    fits = {(r["bits"], r["cards"], r["card_gib"]): r["fits"] for r in rows}
    assert fits[4, 4, 24] and fits[4, 8, 11]  # noqa: PT018  # one claim
    assert not fits[8, 4, 24] and not fits[8, 8, 11]  # noqa: PT018  # one claim
    rates = {(r["bits"], r["card_gib"]): r["offloaded_tokens_s"] for r in rows if r["cards"] == 1}
    assert rates[4, 80] is None  # it fits whole
    assert rates[4, 24] == pytest.approx(0.5, rel=0.1)  # 49 of 65 GB over 25 GB/s
    assert rates[8, 24] < rates[4, 24] / 2
    assert main(["plan", "inference", "--seq", "100000"]) == 0
    assert capsys.readouterr().out.count(" no") > 2
