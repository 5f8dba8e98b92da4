"""Warm-up as DeepSpeed treats it, and a pipeline's instructions: what one stage sends the next one
receives, and every micro-batch is computed once in an order that can run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from glm_core.deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from glm_core.deepspeed.runtime.config import DeepSpeedConfig
from glm_core.deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupLR
from glm_core.deepspeed.runtime.pipe import schedule
from glm_core.deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from glm_core.errors import ConfigError


def sgd(lr: float | torch.Tensor = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    optimizer = sgd(torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    warmup = WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    seen = []
    for _ in range(6):
        warmup.step()
        seen.append(float(rate))
    assert optimizer.param_groups[0]["lr"] is rate
    assert warmup.get_last_lr()[0] is rate
    assert seen == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_a_cosines_ratio() -> None:
    cosine = WarmupCosineLR(sgd(), 8, warmup_num_steps=2, warmup_type="linear", cos_min_ratio=0.1)
    assert cosine.get_lr_ratio() == 0.0
    ratios = []
    for _ in range(9):
        cosine.step()
        ratios.append(cosine.get_lr_ratio())
    assert ratios[:2] == [0.0, 0.5]
    assert ratios[4] == pytest.approx(0.55)
    assert ratios[7:] == pytest.approx([0.1, 0.1])
    assert cosine.get_lr() == [0.5 * ratios[-1]]


def test_warmups_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (0, -3, 2.5):
        with pytest.raises(ValueError, match="warmup_num_steps"):
            WarmupLR(sgd(), warmup_num_steps=steps)  # type: ignore[arg-type]  # wrong on purpose
    strange = WarmupLR(sgd(), warmup_num_steps=8, warmup_type="sqrt")
    usual = WarmupLR(sgd(), warmup_num_steps=8, warmup_type="log")
    strange.step(3)
    usual.step(3)
    assert strange.get_lr() == usual.get_lr()
    assert "'sqrt'" in capsys.readouterr().err
    with pytest.raises(TypeError, match="not a torch optimizer"):
        WarmupLR(object())  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("kind", [schedule.TrainSchedule, schedule.InferenceSchedule])
@pytest.mark.parametrize(("stages", "count"), [(1, 3), (2, 1), (3, 5), (4, 8)])
def test_stages_fit_together(kind: type[schedule.PipeSchedule], stages: int, count: int) -> None:
    plans = [list(kind(count, stages, s)) for s in range(stages)]
    pairs = (
        (schedule.SendActivation, schedule.RecvActivation, 1),
        (schedule.SendGrad, schedule.RecvGrad, -1),
    )
    for stage, plan in enumerate(plans):
        flat = Counter(type(i) for step in plan for i in step)
        assert flat[schedule.ForwardPass] == count
        assert flat[schedule.BackwardPass] in (0, count)
        assert len(plan) == len(plans[0])
        for sends, receives, way in pairs:
            if not 0 <= stage + way < stages:
                assert flat[sends] == 0
                continue
            for here, there in zip(plan, plans[stage + way], strict=True):
                assert sum(type(i) is sends for i in here) == sum(
                    type(i) is receives for i in there
                )
        held: set[int] = set()
        for instruction in (i for step in plan for i in step):
            if type(instruction) is schedule.ForwardPass and flat[schedule.BackwardPass]:
                assert instruction.buffer_id not in held  # nothing kept is overwritten
                held.add(instruction.buffer_id)
            elif type(instruction) is schedule.BackwardPass:
                held.remove(instruction.buffer_id)
        assert not held


def test_an_impossible_stage_is_an_error() -> None:
    with pytest.raises(ConfigError, match="stage_id=2"):
        schedule.TrainSchedule(4, 2, 2)


def test_experts_get_groups_of_their_own() -> None:
    shared, *experts = [torch.nn.Parameter(torch.zeros(n)) for n in (9, 4, 5, 6)]
    for p, name in zip(experts, ("a", "b", "a"), strict=True):
        p.allreduce, p.group_name = False, name  # type: ignore[attr-defined]  # a script's marks
    group = {"params": [shared, *experts], "name": "all", "lr": 0.25}
    first, *rest = split_params_into_different_moe_groups_for_optimizer(group, max_group_size=9)
    assert (first["params"], first["lr"], first.get("moe")) == ([shared], 0.25, None)
    assert [(g["name"], [p.numel() for p in g["params"]]) for g in rest] == [
        ("a", [4]),
        ("a", [6]),
        ("b", [5]),
    ]
    assert all(g["moe"] and g["lr"] == 0.25 for g in rest)


def test_a_config_shows_what_is_in_force() -> None:
    config = DeepSpeedConfig(
        {
            "train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7},
            "bf16": {"enabled": True},
        }
    )
    assert config.train_micro_batch_size_per_gpu == 4
    assert (config.zero_enabled, config.bfloat16_enabled, config.fp16_enabled) == (1, 1, 0)
    assert config.zero_config.prefetch_bucket_size == 7
    assert config.zero_config.overlap_comm
    config.train_batch_size = 9
    with pytest.raises(AssertionError, match="train_batch_size=9"):
        config._configure_train_batch_size()
    assert DeepSpeedZeroConfig(cpu_offload=True).offload_optimizer.device == "cpu"
    with pytest.raises(ConfigError, match="did you mean stage"):
        DeepSpeedZeroConfig(stagee=1)
