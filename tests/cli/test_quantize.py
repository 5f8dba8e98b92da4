"""`glm-core quantize` on a run of `glm-core train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_core.backends import registry
from glm_core.cli import main
from glm_core.config import load
from glm_core.data.open import open_sampler
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.training.quality import score


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    import pydoc_data.topics as t

    folder = tmp_path_factory.mktemp("trained")
    text = "\n\n".join(list(t.topics.values())[:20])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    fields = (
        "model.hidden=64",
        "model.num_layers=1",
        "model.ffn=96",
        "model.vocab=512",
        "data.vocab=512",
        "data.length=32",
        "train.dtype=bfloat16",
    )
    options = [part for field in fields for part in ("--set", field)]
    argv = ["train", "--steps", "2", "--data", str(folder / "text.txt"), "--backend", "reference"]
    assert main([*argv, *options, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_size_error_and_quality_are_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said equals what is written: the bytes, and the model's perplexity."""
    common, out = [str(trained), "--sequences", "8", "--backend", "reference"], tmp_path / "small"
    capsys.readouterr()
    assert main(["quantize", *common, "--group", "32", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [x["name"] for x in facts["layers"]] == [
        f"blocks.0.{n}" for n in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert all(0.05 < x["error"] < 0.12 for x in facts["layers"])
    before, after = facts["before"], facts["after"]
    assert after["linears_bytes"] < 0.3 * before["linears_bytes"]
    assert after["rest_bytes"] == before["rest_bytes"]
    assert before["perplexity"] != after["perplexity"]
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.02)
    again = open_checkpoint(out)
    assert (again.bits, again.config.hidden) == (4, 64)
    assert after["total_bytes"] == sum(t.num_bytes for t in again.files.ranks[0].values())
    assert facts["files"] == {str(f): f.stat().st_size for f in out.iterdir()}
    run = load(trained / "config.toml")
    sampler = open_sampler(run.data, run.train.seed + 1, ".cache", positions=run.model.positions)
    with registry.use("reference"):
        scored = score(again.load(torch.bfloat16, quantized=True), [sampler.next(8)])
    assert scored.perplexity == after["perplexity"]
    tokenizers = [folder / "tokenizer.model" for folder in (out, trained)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    assert main(["quantize", *common, "--bits", "8"]) == 0
    text = capsys.readouterr().out
    assert "blocks.0.mlp.down" in text
    assert "exact match: " in text


def test_a_run_is_a_checkpoint_like_any_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is inspected and converted by its folder or its file; the result can be talked to, by its
    folder or its file, and replies as the run does."""
    [file] = (trained / "checkpoints").glob("*.safetensors")
    sizes, masters = set(), load_file(file)
    for path in (trained, trained / "checkpoints", file):
        capsys.readouterr()
        assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        sizes.add((facts["config"]["hidden"], facts["parameters"], facts["bytes"]))
    n = facts["parameters"]
    assert sizes == {(64, n, 4 * n)}
    out = tmp_path / "out"
    assert main(["checkpoint", "convert", str(trained), str(out)]) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == {k.removeprefix("master.") for k in masters if k.startswith("master.")}
    assert all(torch.equal(t, masters[f"master.{k}"]) for k, t in written.items())
    texts = []
    for model in (trained, out, out / "model.safetensors"):
        capsys.readouterr()
        prompt = ["--prompt", "The [MASK] is", "--max-tokens", "9", "--temperature", "9"]
        prompt += ["--backend", "reference", "--json"]
        assert main(["generate", "--model", str(model), *prompt]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(texts)) == 1
    assert len(texts[0]) > 9
    assert main(["quantize", str(out)]) == 2
    assert "not a training run, so there is no text to measure on; use glm-core checkpoint " in (
        capsys.readouterr().err
    )


def test_a_damaged_run_is_not_converted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    [file] = (run / "checkpoints").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "inspect", str(run)]) == 0  # reads headers only
    for command in (["checkpoint", "convert", str(run), "out"], ["quantize", str(run)]):
        assert main(command) == 2
        assert "damaged, its checksum does not match; use another" in capsys.readouterr().err


def test_what_does_not_fit_is_exit_2(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(trained), "--bits", "5"]) == 2
    assert "bits=5 must be 8 or 4" in capsys.readouterr().err
    common = [str(trained), "--sequences", "8", "--backend", "reference"]
    assert main(["quantize", *common, "--group", "128"]) == 2
    assert (
        "4 bits in groups of 128 do not divide hidden=64, ffn=96; use another multiple of 32"
        in (capsys.readouterr().err)
    )
    assert main(["quantize", "nowhere"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
