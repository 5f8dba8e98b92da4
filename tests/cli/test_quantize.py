"""`glm-core quantize` on a run of `glm-core train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_core.cli import main
from glm_core.pretrained.weights.reading import open_checkpoint


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a run of two steps."""
    import pydoc_data.topics as t

    text = "\n\n".join(list(t.topics.values())[:20])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    fields = (
        "model.hidden=64",
        "model.num_layers=1",
        "model.ffn=96",
        "model.vocab=512",
        "data.vocab=512",
        "data.length=32",
    )
    options = [part for field in fields for part in ("--set", field)]
    argv = ["train", "--steps", "2", "--data", "text.txt", "--backend", "reference"]
    assert main([*argv, *options, "--out", "run"]) == 0
    return "run"


def test_size_error_and_quality_are_told(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = [trained, "--sequences", "8", "--backend", "reference"]
    capsys.readouterr()
    assert main(["quantize", *common, "--group", "32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [x["name"] for x in facts["layers"]] == [
        f"blocks.0.{n}" for n in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert all(0.05 < x["error"] < 0.12 for x in facts["layers"])
    before, after = facts["before"], facts["after"]
    assert after["linears_bytes"] < 0.2 * before["linears_bytes"]
    assert after["rest_bytes"] == before["rest_bytes"]
    assert before["perplexity"] != after["perplexity"]
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.02)
    assert main(["quantize", *common, "--bits", "8", "--out", "small"]) == 0
    again = open_checkpoint("small")
    assert (again.bits, again.config.hidden) == (8, 64)
    assert Path("small/tokenizer.model").read_bytes() == Path("run/tokenizer.model").read_bytes()
    text = capsys.readouterr().out
    assert "blocks.0.mlp.down" in text
    assert "exact match: " in text


def test_what_does_not_fit_is_exit_2(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", trained, "--bits", "5"]) == 2
    assert "bits=5 must be 8 or 4" in capsys.readouterr().err
    assert main(["quantize", trained, "--group", "128", "--sequences", "8"]) == 2
    assert "group=128 must be a multiple of 32 that divides the input width 64" in (
        capsys.readouterr().err
    )
    assert main(["quantize", "nowhere"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
