"""Bad steps: stop, skip or roll back, said in the log; decided by the losses of the run alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from glm_core.backends import registry
from glm_core.config import PolicyConfig, RunConfig, from_dict, to_dict
from glm_core.errors import ConfigError, TrainingError
from glm_core.training import checkpoint
from glm_core.training.policy import Policy, RollBack
from glm_core.training.run import run
from glm_core.training.trainer import Trainer


def with_policy(steps: int = 12, **changes: Any) -> RunConfig:
    values = to_dict(toy.config(steps=steps, warmup_steps=0, lr=1e-4, min_lr=1e-5))
    return from_dict(RunConfig, {**values, "policy": changes})


class Damaged(toy.Sampler):
    """The loss weights of the `count` sequences from number `first` on are multiplied by
    `factor`."""

    def __init__(self, first: int, count: int, factor: float) -> None:
        super().__init__()
        self.bad, self.factor = range(first, first + count), factor
        self.seen: list[int] = []
        self.restored: list[int] = []

    def restore(self, state: dict[str, Any]) -> None:
        self.restored.append(state["index"])
        super().restore(state)

    def next(self, micro_batch: int) -> Any:
        self.seen += range(self.index, self.index + micro_batch)
        batch = super().next(micro_batch)
        if self.index - 1 in self.bad:
            batch.loss_weight.mul_(self.factor)
        return batch


@pytest.mark.parametrize("window", [4, 128])
def test_a_spike_is_far_above_the_recent_losses(window: int) -> None:
    policy = Policy(PolicyConfig(spike="skip", spike_window=window))
    for step in range(1, window // 2):
        policy.good(step, 2.0 + 0.1 * (step % 2))
        assert policy.spike(1e9) == ""  # too few seen
    for step in range(window // 2, 3 * window):
        policy.good(step, 2.0 + 0.1 * (step % 2))
    assert policy.spike(2.05 + 5.9 * 0.05) == ""
    assert "is a spike: more than 6 x 0.0500 above 2.0500" in policy.spike(2.05 + 6.1 * 0.05)
    assert policy.spike(0.0) == policy.spike(math.nan) == ""
    assert Policy(PolicyConfig()).spike(1e9) == ""


def test_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    Policy(PolicyConfig(spike="skip")).decide(7, "spike", "loss 9")
    assert capsys.readouterr().err == "policy.spike=skip: step 7: loss 9: update left out\n"
    with pytest.raises(TrainingError, match=r"^step 7: loss 9$") as caught:
        Policy(PolicyConfig()).decide(7, "nonfinite", "loss 9")
    assert not isinstance(caught.value, RollBack)
    with pytest.raises(RollBack):
        Policy(PolicyConfig(nonfinite="rollback")).decide(7, "nonfinite", "loss 9")


def test_the_limit_counts_bad_steps_without_a_good_one_beyond() -> None:
    policy = Policy(PolicyConfig(nonfinite="skip", limit=2))
    for step in (5, 6):
        policy.decide(step, "nonfinite", "NaN")
    policy.good(4, 1.0)  # before them, after a roll-back
    with pytest.raises(TrainingError, match=r"3 bad steps .*policy.limit=2: resume with a lower"):
        policy.decide(7, "nonfinite", "NaN")
    policy.good(8, 1.0)
    policy.decide(9, "nonfinite", "NaN")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"spike": "leave", "limit": 0},
            "limit=0 must be positive; spike must be one of off, stop",
        ),
        ({"spike_window": 2}, "spike_window=2 must be at least 4"),
        ({"spike_sigma": -1.0}, "spike_sigma=-1.0 must be positive"),
        ({"nonfinit": "skip"}, "unknown key 'policy.nonfinit'"),
    ],
)
def test_bad_keys(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_policy(**changes)
    assert expected in str(caught.value)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_nan_is_skipped_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Damaged(10, 2, math.nan)
    result = run(with_policy(nonfinite="skip"), tmp_path, sampler=sampler)
    assert result.steps == 12
    skipped = [m["step"] for m in lines(tmp_path) if m["skipped"]]
    assert len(skipped) == 1
    err = capsys.readouterr().err
    assert f"policy.nonfinite=skip: step {skipped[0]}: the loss is nan; first not finite: " in err
    assert all(
        torch.isfinite(t).all()
        for t in checkpoint.load(tmp_path)[0].values()
        if t.is_floating_point()
    )


def test_roll_back_passes_over_the_data_and_equals_a_run_that_never_saw_it(tmp_path: Path) -> None:
    sampler = Damaged(14, 2, math.nan)
    result = run(with_policy(nonfinite="rollback"), tmp_path / "a", sampler=sampler)
    assert result.steps == 12
    assert [m["step"] for m in lines(tmp_path / "a")] == list(range(1, 13))
    assert not any(m["skipped"] for m in lines(tmp_path / "a"))
    assert sampler.seen == sorted(set(sampler.seen))  # no sequence twice
    saved_at, gone_on_at = sampler.restored
    control = Trainer(with_policy(), toy.Sampler())
    losses = []
    with registry.use(control.backend):
        while control.steps_done < 12:
            if control.sampler.state()["index"] == saved_at:
                control.sampler.restore({"index": gone_on_at})
            losses.append(control.step().loss)
    assert gone_on_at > 14 >= saved_at
    assert losses == [m["loss"] for m in lines(tmp_path / "a")]


def test_a_spike_is_skipped_and_nothing_to_go_back_to_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_policy(spike="skip", spike_window=4)
    plain = Trainer.backward
    monkeypatch.setattr(
        Trainer,
        "backward",
        lambda self, batches: plain(self, batches) * (50 if self.steps_done == 6 else 1),
    )
    result = run(config, tmp_path / "a", sampler=toy.Sampler())
    assert result.steps == 12
    assert [m["step"] for m in lines(tmp_path / "a") if m["skipped"]] == [7]
    assert "policy.spike=skip: step 7: loss " in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "backward", lambda self, batches: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="there is no checkpoint to go back to"):
        run(with_policy(nonfinite="rollback"), tmp_path / "b", sampler=toy.Sampler())


def test_a_resumed_run_judges_by_the_losses_before(tmp_path: Path) -> None:
    config = with_policy(spike="stop", spike_window=4)
    checkpoints = checkpoint.FileCheckpoints(tmp_path, keep=2)
    trainer = Trainer(config, toy.Sampler(), checkpoints=checkpoints)
    with registry.use(trainer.backend):
        for _ in range(3):
            trainer.step()
    other = Trainer(config, toy.Sampler())
    other.restore(checkpoints.open(trainer.save()))
    assert list(other.policy.losses) == list(trainer.policy.losses)
    assert len(other.policy.losses) == 3
