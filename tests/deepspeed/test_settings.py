"""Every key is judged; none is ignored silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes import PATTERN, WEIGHTS

from glm_core.backends import registry
from glm_core.deepspeed import settings
from glm_core.deepspeed.checkpoint import own_layout
from glm_core.deepspeed.keys import SECTIONS, TOP
from glm_core.deepspeed.runtime.pipe import partition
from glm_core.deepspeed.settings import batches, read, resolve
from glm_core.errors import ConfigError, TrainingError
from glm_core.training.loss_scale import LossScale

GOOD: dict[str, Any] = {"train_batch_size": 8}


def test_the_table_has_all_of_deepspeeds_keys(reference: dict[str, Any]) -> None:
    missing = set(reference["top"]) - TOP.keys()
    for section, names in reference["sections"].items():
        missing |= {f"{section}.{n}" for n in names if n not in SECTIONS[section]}
    assert not missing


def test_loss_scale_moves_like_deepspeeds(reference: dict[str, Any]) -> None:
    for options, theirs in reference["scales"].items():
        window, hysteresis, consecutive = map(int, options.split())
        mine = LossScale(
            scale=2.0**16,
            window=window,
            hysteresis=hysteresis,
            consecutive_hysteresis=bool(consecutive),
            uncounted=1,
        )
        seen = []
        for overflow in PATTERN:
            mine.update(overflow)
            seen.append(mine.scale)
        assert seen == theirs, options


def test_pipelines_are_cut_like_deepspeeds(reference: dict[str, Any]) -> None:
    for (weights, stages), theirs in zip(WEIGHTS, reference["parts"], strict=True):
        cuts = [partition.uniform(len(weights), stages), partition.balanced(weights, stages)]
        assert cuts == theirs, (weights, stages)


def test_overflow_at_the_smallest_scale_is_an_error() -> None:
    scale = LossScale(window=1000, stop_at_minimum=True)
    with pytest.raises(TrainingError, match="minimum"):
        scale.update(True)


def test_the_first_checkpoints_loss_scale_is_read() -> None:
    first = {"scale": 8.0, "hysteresis": 3, "steps": 9, "last_overflow": 4, "left": 1}
    today = {"scale": 8.0, "hysteresis": 3, "good_steps": 4, "overflows": 2}
    assert own_layout._loss_scale(first) == own_layout._loss_scale(today) == today


def test_states_are_known_and_errors_say_a_way_out() -> None:
    for name, key in [*TOP.items(), *((n, k) for s in SECTIONS.values() for n, k in s.items())]:
        assert key.state in ("supported", "no effect", "error", "host", "section"), name
        assert (key.state in ("supported", "section")) == (key.reason == ""), name
    assert {n for n, k in TOP.items() if k.state == "section"} == SECTIONS.keys()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"train_batch_sise": 8}, "did you mean train_batch_size"),
        ({"zero_optimization": {"stag": 1}}, r"did you mean zero_optimization\.stage"),
        ({"zero_optimization": {"stage": 4}}, "use 0, 1, 2 or 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "NVMe"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "fp32, bf16 or fp16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "in float32; use fp32"),
        ({"zero_optimization": True}, "expected an object"),
        ({"amp": {"enabled": True}}, "removed from DeepSpeed"),
        ({"train_batch_size": "auto"}, "Trainer"),
        ({"train_batch_size": 7}, "is not train_micro"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        *(({"fp16": {"loss_scale": v}}, "a number") for v in (-1, True, [], "x", float("inf"))),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "positive"),
        ({"fp16": {"min_loss_scale": True}}, "positive"),
        ({"checkpoint": {"tag_validation": "foo"}}, "Ignore, Warn or Fail"),
        ({"gradient_allreduce_op": "max"}, "mean or sum"),
        ({"communication_data_type": "int8"}, "fp32, bf16 or fp16"),
        ({"compile": {"deepcompile": True}}, "torch.compile"),
    ],
)
def test_bad_configs_say_what_and_how_else(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve({**GOOD, **config}, 2)


def test_on_an_accelerator_optimizer_and_weights_are_offloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "backend", lambda: registry.get("cuda"))

    def zero(**section: Any) -> dict[str, Any]:
        return {**GOOD, "zero_optimization": section}

    cpu, nvme = {"device": "cpu", "pin_memory": True}, {"device": "nvme", "nvme_path": "/tmp"}
    for section, expected in (
        ({"stage": 2, "offload_optimizer": cpu}, (True, False, True)),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, (False, False, False)),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, (True, False, False)),
        ({"stage": 3, "offload_param": cpu}, (True, True, True)),
        ({"stage": 3, "cpu_offload_param": True}, (True, True, False)),
        ({"stage": 2, "offload_param": cpu}, (False, False, True)),
    ):
        taken = resolve(zero(**section), 2)
        assert (taken.offload, taken.offload_param, taken.pin_memory) == expected, section
    assert "only ZeRO 3 has it" in capsys.readouterr().err
    for what in ("offload_optimizer", "offload_param"):
        with pytest.raises(ConfigError, match="use cpu"):
            resolve(zero(stage=3, **{what: nvme}), 2)


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"amp.*stage=9") as told:
        resolve({"amp": True, "zero_optimization": {"stage": 9}, "oops": 1}, 1)
    assert "oops" in str(told.value)
    assert "train_batch_size" in str(told.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((16, None, None), (16, 8, 1)),
        ((16, 2, None), (16, 2, 4)),
        ((16, None, 4), (16, 2, 4)),
        ((None, 2, 4), (16, 2, 4)),
        ((None, 2, None), (4, 2, 1)),
    ],
)
def test_the_triangle(given: tuple[Any, ...], wanted: tuple[int, ...]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {n: v for n, v in zip(names, given, strict=True) if v is not None}
    assert tuple(batches(config, 2).values()) == wanted


def test_a_key_given_twice_is_an_error(tmp_path: Any) -> None:
    (tmp_path / "c.json").write_text('{"fp16": {}, "fp16": {}}')
    with pytest.raises(ConfigError, match="twice: fp16"):
        read(tmp_path / "c.json")


def test_defaults_are_deepspeeds() -> None:
    settings = resolve({**GOOD, "fp16": {"enabled": True}}, 2)
    assert settings.clip == 1.0
    assert settings.loss_scale().scale == 2.0**16
    assert settings.precision.compute == torch.float16
