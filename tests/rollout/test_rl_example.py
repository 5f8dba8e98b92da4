"""examples/rl trains a tiny version: rewards rise, on-policy ratios are near 1, and the page is
written."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
from rooms import ROOT

from glm_core import cli
from glm_core.backends import registry

pytestmark = pytest.mark.skipif(not registry.probe("cpu").ok, reason="backend cpu is not built")
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "rl" / "grpo.py"))


def test_a_policy_learns_from_rewards_alone() -> None:
    task = EXAMPLE["Task"](digits=1, prompts=4, group=8, updates=2)
    task = dataclasses.replace(task, train=dataclasses.replace(task.train, steps=16, lr=2e-2))
    trained = EXAMPLE["train"](task, "float32", 1)
    steps = trained.steps
    assert steps[-1].reward > steps[0].reward + 0.15
    assert max(s.max_ratio for s in steps) < 1e-4  # float32 rounding, no more
    assert min(s.late_ratio for s in steps) > 1e-3  # the second update is off-policy


def test_what_a_run_leaves_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "1", "--seeds", "1", "--dtypes", "bfloat16", "--arithmetic", "exact"]
    EXAMPLE["main"]([*words, "--out", str(tmp_path)])
    [command] = re.findall(r"judge it: glm-core (.+)", capsys.readouterr().out)
    assert cli.main(command.split()) == 0
    assert "identical: all log probabilities are the same to the bit" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("reply", "share"), [((3, 2, 1), 1.0), ((3, 1, 2), 1 / 3), ((1, 3, 2), 0.0)]
)
def test_the_reward_counts_right_digits(reply: tuple[int, ...], share: float) -> None:
    prompt = (EXAMPLE["BEGIN"], 1, 2, 3, EXAMPLE["EQUALS"])
    assert EXAMPLE["reward"](prompt, reply) == pytest.approx(share)


def test_advantages_compare_replies_to_one_prompt() -> None:
    import torch

    task = EXAMPLE["Task"](prompts=2, group=2)
    found = EXAMPLE["advantages"](task, torch.tensor([1.0, 0.0, 0.5, 0.5]))
    assert found[0] == -found[1] > 0
    assert not found[2:].any()


def test_the_page_shows_every_run() -> None:
    step = EXAMPLE["Step"](0.5, 1e-6, 2e-6, 0.25, 0.1)
    page = EXAMPLE["page"]({"float32 exact": [[step, step]] * 2})
    assert page.count("<figure>") == 4
    assert page.count("float32 exact") == 4
