"""The judge on a small model with experts: planted mistakes are named and placed, honest
differences acquitted; and the command reads files and gives exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from glm_core import cli
from glm_core.cli import rollout as command
from glm_core.errors import RolloutError
from glm_core.rollout import evidence, files, mistakes
from glm_core.rollout.campaign import Campaign, Row, judged
from glm_core.rollout.distribution import (
    Drawn,
    Shaping,
    of_tokens,
    reported,
    sampled_from,
    shaped,
)
from glm_core.rollout.evidence import gather
from glm_core.rollout.files import Reply, Rollout, Settings
from glm_core.rollout.paths import Paths
from glm_core.rollout.planted import Case, honest, make_case, plants


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("experts", "float32", 1, num_replies=8)


@pytest.fixture(scope="module")
def paths(case: Case) -> Paths:
    return Paths({0: case.model}, case.replies)


PLACED = (
    "prompts' cache of older weights",
    "router in bfloat16",
    "rope one short, chunks of 16",
    "mask one key short at a hit",
    "int8, groups of 32",
)


@pytest.mark.parametrize("label", PLACED)
def test_a_planted_mistake_is_named_and_placed(case: Case, paths: Paths, label: str) -> None:
    [plant] = [p for p in plants() if p.label == label]
    row = judged(case, plant, paths)
    assert (row.diverged, row.named) == (True, plant.cause)
    assert row.placed, row.place


@pytest.mark.parametrize("label", ["tied head not refreshed", "top-p 0.9 folded in"])
def test_a_planted_mistake_is_named_without_the_paths(case: Case, label: str) -> None:
    [plant] = [p for p in plants() if p.label == label]
    row = judged(case, plant)
    assert (row.diverged, row.named) == (True, plant.cause)


@pytest.mark.parametrize("label", ["experts added backwards"])
def test_an_honest_difference_is_acquitted(case: Case, paths: Paths, label: str) -> None:
    [plant] = [p for p in honest() if p.label == label]
    row = judged(case, plant, paths)
    assert not row.diverged
    assert not row.parted, row.place


def written(case: Case, path: Path, shaping: Shaping | None = None) -> str:
    rollout = Rollout(case.settings, case.replies)
    if shaping is not None:
        rollout = rollout.given(case.engine(shaping=shaping))
    files.save(rollout, path)
    return str(path)


def test_the_command_judges_files(
    case: Case,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = written(case, tmp_path / "own.jsonl")
    folded = written(case, tmp_path / "folded.jsonl", Shaping(0.9))
    monkeypatch.setattr(command, "load_model", lambda path, dtype: case.model)
    monkeypatch.setattr(evidence, "gather", lambda *args: case.evidence)
    words = ["align", "rollout", own, folded]
    assert cli.main(words) == 2
    assert "not judged" in capsys.readouterr().out
    assert cli.main([*words, "--control", own, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["figures"]["tokens"] == 8 * 24
    assert cli.main([*words, "--model", "DIR"]) == 1
    shown = capsys.readouterr().out
    assert "temperature 0.9 is folded into the reported log probabilities" in shown
    assert cli.main(["align", "rollout", own, own]) == 0
    assert "identical" in capsys.readouterr().out


def test_the_command_refuses_what_does_not_match(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = written(case, tmp_path / "own.jsonl")
    warm = dataclasses.replace(case, settings=Settings(temperature=0.5))
    other = written(warm, tmp_path / "warm.jsonl")
    assert cli.main(["align", "rollout", own, other]) == 2
    assert "temperature is 1.0 and 0.5" in capsys.readouterr().err
    assert cli.main(["align", "rollout", own]) == 2
    assert "give the trainer's and the sampler's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "fact"),
    [
        (Reply((1,), (96,), (-1.0,)), "token 96 is not in the model's vocabulary of 96"),
        (Reply((1,) * 128, (1,), (-1.0,)), "129 tokens are more than the model's max_length=128"),
        (Reply((1,), (1,), (-1.0,), 4), "step 4: no weights are given for it"),
    ],
)
def test_tokens_of_another_model_are_refused(case: Case, reply: Reply, fact: str) -> None:
    with pytest.raises(RolloutError, match=fact):
        gather({0: case.model}, [reply], Settings())


def test_a_distribution_is_shaped_as_the_sampler_shapes_it() -> None:
    logits, reply = torch.tensor([[2.0, 1.0, -1.0, 0.0]]), Reply((0, 2), (1,), (-1.0,))
    seen = torch.tensor([[True, False, True, False]])
    tokens = Drawn(logits, torch.tensor(reply.tokens), seen)
    found = shaped(tokens, Shaping(0.5, 0.9, 2.0))
    wanted = torch.tensor([2.0, 2.0, -4.0, 0.0]).double()  # (2 / 2) / 0.5, 1 / 0.5, -1 * 2 / 0.5
    top = wanted[:2].log_softmax(-1)
    assert torch.allclose(found[0, :2], top)
    assert found[0, 2] == found[0, 3] == -torch.inf
    assert of_tokens(tokens, Shaping(0.5, 0.9, 2.0))[0] == pytest.approx(float(top[1]))


@pytest.mark.parametrize(
    ("processed", "before_top_p", "wanted"),
    [
        (False, False, Shaping()),
        (True, False, Shaping(0.5, 0.9, 1.2)),
        (True, True, Shaping(0.5, 1.0, 1.2)),
    ],
)
def test_the_settings_state_what_is_reported(
    processed: bool, before_top_p: bool, wanted: Shaping
) -> None:
    how = {"processed": processed, "before_top_p": before_top_p}
    stated = Settings(temperature=0.5, top_p=0.9, repetition_penalty=1.2, **how)
    assert reported(stated) == wanted
    assert sampled_from(stated) == Shaping(0.5, 0.9, 1.2)


def test_no_two_known_mistakes_have_the_same_words(case: Case) -> None:
    words = [(c.name, c.sentence) for c in case.evidence.causes]  # steps are joined by them
    assert len(words) == len(set(words))
    assert sum("8 bits" in sentence for _, sentence in words) == 2


def test_a_shared_model_with_another_head_has_the_same_tensors(case: Case) -> None:
    head = torch.zeros_like(case.model.embedding)
    other = mistakes.sharing(case.model, head)
    assert other.embedding.data_ptr() == case.model.embedding.data_ptr()
    assert not other.head_weight.any()


def test_the_summary_counts_what_was_found_and_named() -> None:
    row = Row("c", "one", "temperature", True, "temperature", 9.0, False, False, "")
    missed = dataclasses.replace(row, diverged=False, named="")
    plain = dataclasses.replace(missed, label="two", cause="")
    assert Campaign([row] * 19 + [missed, plain]).reached
    assert not Campaign([row] * 18 + [missed] * 2 + [plain]).reached
    assert not Campaign([row, dataclasses.replace(plain, diverged=True)]).reached
    assert "19 of 20 planted mistakes found" in Campaign([row] * 19 + [missed]).text()
