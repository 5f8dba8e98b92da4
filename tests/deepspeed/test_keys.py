"""Every config key is tried: a supported one changes a setting, one without effect is mentioned
once, an error says what the key would have changed and what to do instead."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm_core.deepspeed import settings
from glm_core.deepspeed.keys import SECTIONS, TOP, Key
from glm_core.deepspeed.settings import Settings, resolve
from glm_core.errors import ConfigError

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2}
KEYS = {
    **{(name,): key for name, key in TOP.items() if key.state != "section"},
    **{(s, name): key for s, table in SECTIONS.items() for name, key in table.items()},
}
HALF, BF16 = {"enabled": True}, {"enabled": True}


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: value} if len(path) == 1 else {path[0]: {path[1]: value}}


def keys(state: str) -> list[tuple[str, ...]]:
    return [path for path, key in KEYS.items() if key.state == state]


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    """Joins configs' sections, one level deep."""
    whole: dict[str, Any] = {}
    for config in configs:
        for name, value in config.items():
            old = whole.get(name)
            whole[name] = {**old, **value} if isinstance(old, dict) else value
    return whole


@pytest.mark.parametrize("path", keys("no effect"), ids=".".join)
def test_without_effect_is_said_once(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = resolve(BASE, 2)
    for _ in range(2):
        given = resolve({**BASE, **nested(path, 3)}, 2)
    printed = capsys.readouterr().err
    assert printed.count(f"config key {'.'.join(path)} has no effect here: ") == 1
    given.raw = plain.raw
    assert given == plain


@pytest.mark.parametrize("path", keys("error"), ids=".".join)
def test_an_error_says_the_way_out(path: tuple[str, ...]) -> None:
    key: Key = KEYS[path]
    with pytest.raises(ConfigError) as raised:
        resolve({**BASE, **nested(path, 3)}, 2)
    assert ".".join(path) + "=3: " + key.reason in str(raised.value)
    assert ";" in key.reason
    for harmless in (*key.harmless, None, False, {"enabled": False, "opt_level": "O1"}):
        resolve({**BASE, **nested(path, harmless)}, 2)
    with pytest.raises(ConfigError) if key.empty_is_on else nullcontext():
        resolve({**BASE, **nested(path, {})}, 2)


@pytest.mark.parametrize("path", keys("host"), ids=".".join)
def test_what_is_kept_on_the_host_is_there_already_on_the_cpu(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = nested(path, True if "cpu" in path[1] else {"device": "cpu", "pin_memory": True})
    resolve({**BASE, **given}, 2)
    assert f"{'.'.join(path)} has no effect here: the run is on the CPU" in capsys.readouterr().err
    key: Key = KEYS[path]
    for bad in (3, {"device": "nvme"}):
        with pytest.raises(ConfigError, match=re.escape(key.reason)):
            resolve({**BASE, **nested(path, bad)}, 2)
    for nothing in (None, False, {}, {"device": "none"}):
        resolve({**BASE, **nested(path, nothing)}, 2)
    monkeypatch.setattr(settings, "backend", lambda: SimpleNamespace(device_type="cuda"))
    given["zero_optimization"]["stage"] = 3
    assert resolve({**BASE, **given}, 2).offload


def test_the_dtype_of_weights_is_that_of_the_run_and_of_buffers_any() -> None:
    resolve({**BASE, "bf16": BF16, "data_types": {"param_dtype": "bf16"}}, 2)
    with pytest.raises(AssertionError, match="set those instead"):
        resolve({**BASE, "bf16": BF16, "data_types": {"param_dtype": "fp16"}}, 2)
    given = resolve({**BASE, "bf16": BF16, "data_types": {"buffer_dtype": "fp16"}}, 2)
    assert given.buffers == torch.float16
    with pytest.raises(ConfigError, match="use fp32, bf16 or fp16"):
        resolve({**BASE, "data_types": {"buffer_dtype": "half"}}, 2)


def test_the_dtype_of_sums_is_taken_where_it_changes_nothing() -> None:
    for given in ({}, {"bf16": BF16}):
        for dtype in (None, "fp32", "bf16" if given else "fp32"):
            resolve({**BASE, **given, "data_types": {"grad_accum_dtype": dtype}}, 2)
    for stage in (0, 1):
        two = {**BASE, "zero_optimization": {"stage": stage}}
        other = {**two, "data_types": {"grad_accum_dtype": "bf16"}}
        with nullcontext() if stage else pytest.raises(NotImplementedError):
            resolve(other, 2)  # one micro-batch: no sum, but DeepSpeed refuses it in stage 0
    summed = {**BASE, "gradient_accumulation_steps": 2, "bf16": BF16}
    with pytest.raises(ConfigError, match="in float32; use fp32"):
        resolve({**summed, "data_types": {"grad_accum_dtype": "bf16"}}, 2)


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
SUPPORTED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("train_batch_size", 8, {}, "accumulation"),
    ("train_micro_batch_size_per_gpu", 5, {}, "micro_batch"),
    ("gradient_accumulation_steps", 3, {}, "train_batch"),
    ("managed_gradient_accumulation", False, {}, "managed"),
    ("gradient_clipping", 0.25, {}, "clip"),
    ("prescale_gradients", True, {"gradient_predivide_factor": 2.0}, "predivide"),
    ("gradient_predivide_factor", 4.0, {"prescale_gradients": True}, "predivide"),
    ("gradient_allreduce_op", "sum", {}, "divide_by_ranks"),
    ("communication_data_type", "bf16", {}, "precision"),
    ("steps_per_print", 7, {}, "steps_per_print"),
    ("dataloader_drop_last", True, {}, "drop_last"),
    ("optimizer.type", "SGD", {}, "optimizer"),
    ("optimizer.params", {"lr": 2.0}, {"optimizer": {"type": "SGD"}}, "optimizer"),
    ("scheduler.type", "OneCycle", {}, "scheduler"),
    ("scheduler.params", {"a": 1}, {"scheduler": {"type": "OneCycle"}}, "scheduler"),
    ("fp16.enabled", True, {}, "precision"),
    ("fp16.auto_cast", True, {"fp16": HALF}, "auto_cast"),
    ("fp16.loss_scale", 8.0, {"fp16": HALF}, "loss_scale"),
    ("fp16.initial_scale_power", 4, {"fp16": HALF}, "loss_scale"),
    ("fp16.loss_scale_window", 9, {"fp16": HALF}, "loss_scale"),
    ("fp16.hysteresis", 5, {"fp16": HALF}, "loss_scale"),
    ("fp16.consecutive_hysteresis", True, {"fp16": HALF}, "loss_scale"),
    ("fp16.min_loss_scale", 2.0, {"fp16": HALF}, "loss_scale"),
    ("bf16.enabled", True, {}, "precision"),
    ("bf16.check_grad_overflow", False, {"bf16": BF16}, "skip_overflow"),
    ("bfloat16.enabled", True, {}, "precision"),
    ("bfloat16.check_grad_overflow", False, {"bfloat16": BF16}, "skip_overflow"),
    ("zero_optimization.stage", 2, {}, "stage"),
    ("zero_optimization.reduce_bucket_size", 100, {}, "bucket"),
    ("zero_optimization.param_persistence_threshold", 9, {}, "merge_below"),
    ("zero_optimization.stage3_param_persistence_threshold", 0, {}, "merge_below"),
    ("zero_optimization.leaf_module", {"classes": ["A"]}, {}, "leaves"),
    ("zero_optimization.load_from_fp32_weights", False, {}, "load_masters"),
    ("zero_optimization.gather_16bit_weights_on_model_save", True, {}, "gather_on_save"),
    ("zero_optimization.stage3_gather_16bit_weights_on_model_save", True, {}, "gather_on_save"),
    ("zero_optimization.stage3_gather_fp16_weights_on_model_save", True, {}, "gather_on_save"),
    ("zero_optimization.ignore_unused_parameters", False, OFFLOADED, "all_used"),
    ("zero_optimization.enable_sanity_checks", True, {}, "sanity_checks"),
    ("zero_optimization.cpu_offload_use_pin_memory", True, {}, "pin_memory"),
    ("checkpoint.tag_validation", "Fail", {}, "tag_validation"),
    ("checkpoint.load_universal", True, {}, "load_universal"),
]
WATCHED = {"wall_clock_breakdown", "csv_monitor", "tensorboard", "flops_profiler"}
"""own/watched.py shows these"""
JUDGED = {"data_types"}
"""tried by test_the_dtype_of_..."""
PIPES = {"pipeline", "activation_checkpointing"}
"""pipeline_own.py and test_checkpointing.py show these"""


def test_every_supported_key_is_tried() -> None:
    tried = {name for name, *_ in SUPPORTED}
    assert tried == {".".join(p) for p in keys("supported") if p[0] not in WATCHED | PIPES | JUDGED}


@pytest.mark.parametrize(("name", "value", "more", "field"), SUPPORTED, ids=lambda v: str(v)[:60])
def test_supported_changes_a_setting(
    name: str, value: Any, more: dict[str, Any], field: str
) -> None:
    def seen(config: dict[str, Any]) -> Any:
        setting = getattr(resolve(merged(BASE, config), 2), field)
        return setting() if field == "loss_scale" else setting

    assert field in (*Settings.__dataclass_fields__, "loss_scale")
    assert seen(merged(more, nested(tuple(name.split(".")), value))) != seen(more)
