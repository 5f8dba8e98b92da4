"""`glm-core train --plan` as a user starts it: the same curve as one process, resumed under another
plan."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
import torch
from folders import chatglm3
from plans import needs
from ranks import Ranks

from glm_core import cli
from glm_core.backends import registry
from glm_core.config import load
from glm_core.pretrained.finetune import planned
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer

SIZES = (
    "model.num_layers=2",
    "model.hidden=32",
    "model.ffn=64",
    "model.vocab=512",
    "data.vocab=512",
    "data.length=32",
    "train.global_batch=8",
    "train.save_every=2",
    "train.warmup_steps=1",
)
OPTIONS = ["train", "--backend", "reference", "--steps", "4"]


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@needs("dp=2,zero=2")
def test_a_run_under_one_plan_goes_on_under_another(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(list(pydoc_data.topics.topics.values())[:20])
    Path("text.txt").write_text(text, encoding="utf-8")
    words = [*OPTIONS, "--data", "text.txt", *(w for s in SIZES for w in ("--set", s))]
    assert cli.main([*words, "--out", "alone"]) == 0
    capfd.readouterr()

    def job(*more: str) -> str:
        command = [*words, "--out", "job", "--timeout", "300", *more]
        done = ranks.run("elastic_workers.command", 2, command, folder=tmp_path)
        assert done.codes == [0, 0], done.told
        return done.told

    told = job("--plan", "tp=2,micro_batches=2")
    assert told.count("step 4: loss ") == 1  # rank 0 alone
    shutil.rmtree("job/checkpoints/step-00000004")
    job("--plan", "dp=2,zero=2", "--resume")
    alone, both = curve(Path("alone")), curve(Path("job"))
    assert [s for s, _, _ in both] == [1, 2, 3, 4]
    for (_, loss, norm), (_, mine, own) in zip(alone, both, strict=True):
        assert mine == pytest.approx(loss, rel=1e-6)
        assert own == pytest.approx(norm, rel=1e-5)


def test_a_plan_trains_all_weights_of_a_base(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = chatglm3(tmp_path / "base")
    line = {"prompt": "who runs?", "response": "the lazy dog"}
    Path("pairs.jsonl").write_text(json.dumps(line))
    words = ["train", "--plan", "tp=2", "--base", "base", "--pairs", "pairs.jsonl", "--out", "job"]
    words += ["--backend", "reference", "--steps", "1", "--set", "data.length=48"]
    words += ["--set", "train.micro_batch=2", "--set", "train.global_batch=2"]
    done = ranks.run("elastic_workers.command", 2, words, folder=tmp_path)
    assert done.codes == [0, 0], done.told
    config = load(Path("job/config.toml"))
    _, sampler, _ = planned(base, "pairs.jsonl", config)
    alone = SingleProcess(config, model=open_checkpoint(base).load(torch.float32))
    with registry.use("reference"):
        result = Trainer(config, sampler, alone).step()
    [(_, loss, norm)] = curve(Path("job"))
    assert loss == pytest.approx(result.loss, rel=1e-6)
    assert norm == pytest.approx(result.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plan", "tpp=2"], "unknown plan key 'tpp'"),
        (["--plan", "tp=2"], "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        (["--plan", "tp=2", "--compile"], "cannot be combined with train.compile=true"),
        (["--plan", "tp=2", "--base", "x"], "are trained on --pairs; give both or neither"),
    ],
    ids=["key", "alone", "compile", "base"],
)
def test_what_cannot_start_says_why(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", "--backend", "reference", *words]) == 2
    assert told in capsys.readouterr().err
