"""Turns a DeepSpeed config into settings. Every key is judged, and all problems are reported
together."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from glm_core.deepspeed.accelerator.real_accelerator import backend
from glm_core.deepspeed.keys import SECTIONS, TOP, Key
from glm_core.deepspeed.notices import say_once
from glm_core.distributed.precision import Precision
from glm_core.errors import ConfigError, unknown
from glm_core.training.loss_scale import LossScale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BadConfig(ConfigError, AssertionError, ValueError, NotImplementedError):
    """A config that cannot be run. DeepSpeed raises one or the other of the last three, by key; a
    script may catch any of them."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Settings:
    """One engine's settings, with DeepSpeed's defaults."""

    train_batch: int
    """samples per update, over all data-parallel ranks"""
    micro_batch: int
    """samples per rank and micro-batch"""
    accumulation: int
    """micro-batches per update"""
    managed: bool = True
    """the engine counts micro-batches; False: every `step` is an update, whatever came before it"""
    stage: int = 0
    """of ZeRO, 0 to 3"""
    precision: Precision = dataclasses.field(default_factory=Precision)
    buffers: torch.dtype | None = None
    """the dtype of floating-point buffers; None: they keep their own"""
    fp16: dict[str, Any] = dataclasses.field(default_factory=dict)
    """the config's section, for the loss scale"""
    skip_overflow: bool = False
    """skip an update whose gradients are not finite (fp16, and bf16 unless it says otherwise)"""
    clip: float = 1.0
    """the largest gradient norm; 0 means any"""
    divide_by_ranks: bool = True
    """gradients are means over ranks; False: sums"""
    predivide: float = 1.0
    """the factor by which gradients are divided before they are summed over ranks"""
    bucket: int = 500_000_000
    """elements reduced by one collective"""
    offload: bool = False
    """masters and the optimizer's state are in main memory, which is not the device's"""
    offload_param: bool = False
    """ZeRO 3: so are the weights, which are the masters"""
    pin_memory: bool = False
    """what travels between main memory and the device is page-locked"""
    merge_below: int = 100_000
    """ZeRO 3: layers whose parameters all have at most this many elements are gathered together"""
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)
    """ZeRO 3: `classes`, `names` and `name_suffixes` of modules that are gathered as one"""
    all_used: bool = False
    """an update is an error where a parameter got no gradient"""
    sanity_checks: bool = False
    """ZeRO 3: a change inside GatheredParameters that would be lost is an error"""
    auto_cast: bool = False
    """cast the inputs of `forward` to the working dtype"""
    optimizer: tuple[str, dict[str, Any]] | None = None
    """type and parameters; None: the script brings its own"""
    scheduler: tuple[str, dict[str, Any]] | None = None
    """type and parameters; None: the script brings its own, or none"""
    steps_per_print: int | None = None
    """updates between two printed lines of progress; None or 0: none are printed"""
    drop_last: bool = False
    """leave out an epoch's last micro-batch where it is not full"""
    tag_validation: str = "warn"
    """what happens where checkpoint tags differ over ranks: ignore, warn or fail"""
    load_masters: bool = True
    """load_checkpoint takes masters from the checkpoint's float32 weights, not its 16-bit ones"""
    load_universal: bool = False
    """load_checkpoint without a tag takes the one that `latest_universal` names"""
    gather_on_save: bool = False
    """save_16bit_model may gather the weights in ZeRO 3"""
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)
    """the config as the script gave it"""

    def loss_scale(self) -> LossScale:
        """Makes a fresh loss scale. Raises ConfigError."""
        if self.precision.compute != torch.float16:
            return LossScale()
        f = self.fp16
        if f.get("loss_scale", 0):
            return LossScale(scale=float(f["loss_scale"]))
        return LossScale(
            scale=2.0 ** f.get("initial_scale_power", 16),
            window=int(f.get("loss_scale_window", 1000)),
            hysteresis=int(f.get("hysteresis", 2)),
            consecutive_hysteresis=bool(f.get("consecutive_hysteresis", False)),
            minimum=float(f.get("min_loss_scale", 1)),
            stop_at_minimum=True,
            uncounted=1,
        )


def read(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config as a dict. It may be given as a dict, as the path of a JSON file, or as
    base64 of JSON. Raises ConfigError, also for a key that is there twice."""
    if isinstance(config, Mapping):
        return dict(config)
    text = str(config)
    try:
        body = Path(text).read_text(encoding="utf-8")
    except OSError as error:
        try:
            body = base64.urlsafe_b64decode(text).decode()
        except (binascii.Error, ValueError):
            raise ConfigError(f"config {text}: {error.strerror}; pass a JSON file") from None
    try:
        parsed = json.loads(body, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise BadConfig(f"config {text}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"config {text}: expected an object, received {type(parsed).__name__}")
    return parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [k for k, _ in pairs]
    if duplicates := sorted({n for n in names if names.count(n) > 1}):
        raise BadConfig(f"config: given twice: {', '.join(duplicates)}; keep one")
    return dict(pairs)


def resolve(config: Mapping[str, Any], ranks: int) -> Settings:
    """Returns the settings for `ranks` data-parallel ranks. Raises a ConfigError that lists every
    unknown key, every key that would change training and is not supported, and every bad value."""
    bad: list[str] = []
    judge(config, TOP, "", bad)
    sound = {
        k: v
        for k, v in config.items()
        if isinstance(v, Mapping) or k not in SECTIONS  # `judge` has reported the others
    }
    values: dict[str, Any] = {}

    def take(names: str, make: Callable[[], dict[str, Any]]) -> None:
        try:
            values.update(make())
        except (ConfigError, TypeError, ValueError, KeyError) as error:
            bad.append(str(error) if isinstance(error, ConfigError) else f"{names}: {error}")

    take("batch sizes", lambda: batches(sound, ranks))
    take("fp16/bf16", lambda: _precision(sound))
    take("zero_optimization", lambda: _zero(sound))
    take("optimizer/scheduler", lambda: _recipes(sound))
    take("gradients", lambda: _gradients(sound))
    take("checkpoint", lambda: _checkpoint(sound))
    if bad:
        raise BadConfig("; ".join(bad))
    return Settings(
        **values,
        managed=config.get("managed_gradient_accumulation", True) is not False,
        steps_per_print=config.get("steps_per_print"),
        drop_last=bool(config.get("dataloader_drop_last", False)),
        raw=dict(config),
    )


def judge(config: Mapping[str, Any], table: Mapping[str, Key], prefix: str, bad: list[str]) -> None:
    """Judges every key of one level of the config. Problems are appended to `bad`; a key without
    effect is mentioned on stderr."""
    for name, value in config.items():
        key, path = table.get(name), f"{prefix}{name}"
        if key is None:
            bad.append(unknown("config key", path, (f"{prefix}{k}" for k in table)))
        elif value == "auto" and "auto" not in key.harmless:
            bad.append(f'{path}: "auto" is filled in by the Hugging Face Trainer; give a value')
        elif key.state == "error" and not _harmless(key, value):
            bad.append(f"{path}={value!r}: {key.reason}")
        elif key.state == "host":
            _judge_host(path, value, key, bad)
        elif key.state == "no effect":
            say_once(f"config key {path} has no effect here: {key.reason}")
        elif key.state == "section":
            if isinstance(value, Mapping):
                judge(value, SECTIONS[name], f"{path}.", bad)
            else:
                bad.append(f"{path}: expected an object, received {value!r}")


def _harmless(key: Key, value: Any) -> bool:
    if key.empty_is_on and value == {}:
        return False
    return disabled(value) or value in key.harmless


def disabled(value: Any) -> bool:
    """Is it a value of a key, or a section, that asks for nothing?"""
    if isinstance(value, Mapping):
        return not value or value.get("enabled", True) in (False, None)
    return value is None or value is False


def _judge_host(path: str, value: Any, key: Key, bad: list[str]) -> None:
    """Judges a request to keep something in the host's memory: on the CPU it is there already."""
    place = value.get("device") if isinstance(value, Mapping) else value
    if place is None or place is False or place == "none":
        return
    if place is True or place == "cpu":
        if backend().device_type == "cpu":
            say_once(f"config key {path} has no effect here: the run is on the CPU already")
        return
    bad.append(f"{path}={value!r}: {key.reason}")


def batches(config: Mapping[str, Any], ranks: int) -> dict[str, int]:
    """Returns the batch sizes, of which train_batch_size = micro-batch x accumulation x ranks.
    Missing ones are computed as DeepSpeed does. Raises ConfigError where the equation does not
    hold."""
    total = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    steps = config.get("gradient_accumulation_steps")
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or value <= 0):
            raise ConfigError(f"{name}={value!r}: must be a positive integer")
    if total is None and micro is None:
        raise ConfigError(
            "train_batch_size: neither it nor train_micro_batch_size_per_gpu is given; give one"
        )
    if steps is None:
        steps = total // micro // ranks if total and micro else 1
    micro = (total or 0) // ranks // steps if micro is None else micro
    total = micro * steps * ranks if total is None else total
    if min(micro, steps) <= 0 or total != micro * steps * ranks:
        raise ConfigError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps} x {ranks} data-parallel ranks; change one"
        )
    return {"train_batch": total, "micro_batch": micro, "accumulation": steps}


def _precision(config: Mapping[str, Any]) -> dict[str, Any]:
    fp16, bf16 = config.get("fp16", {}), config.get("bf16", config.get("bfloat16", {}))
    if fp16.get("enabled") and bf16.get("enabled"):
        raise ConfigError("fp16 and bf16 are both enabled; enable one")
    _check_loss_scale(fp16)
    compute = torch.float32
    if fp16.get("enabled") or bf16.get("enabled"):
        compute = torch.float16 if fp16.get("enabled") else torch.bfloat16
    name = config.get("communication_data_type")
    if name is not None and str(name).lower() not in DTYPES:
        raise ConfigError(f"communication_data_type={name!r}: use fp32, bf16 or fp16")
    low = compute != torch.float32
    types = config.get("data_types", {})
    for key in ("param_dtype", "buffer_dtype"):
        if types.get(key) is not None and types[key] not in DTYPES:
            raise BadConfig(f"data_types.{key}={types[key]!r}: use fp32, bf16 or fp16")
    if types.get("param_dtype") is not None and DTYPES[types["param_dtype"]] != compute:
        raise BadConfig(
            f"data_types.param_dtype={types['param_dtype']!r}: is not the dtype of fp16/bf16; set "
            "those instead"
        )
    _check_sums(config, compute)
    return {
        "buffers": DTYPES.get(types.get("buffer_dtype")),
        "precision": Precision(
            compute=compute, reduce=DTYPES[str(name).lower()] if name else torch.float32
        ),
        "fp16": dict(fp16),
        "auto_cast": bool(fp16.get("auto_cast", False)),
        "skip_overflow": low and bool(bf16.get("check_grad_overflow", True)),
    }


def _check_loss_scale(fp16: Mapping[str, Any]) -> None:
    """Raises ConfigError where a number of the loss scale is none, or cannot be one."""
    try:
        given = fp16.get("loss_scale", 0)
        fixed = math.nan if isinstance(given, bool) else float(0 if given is None else given)
    except (TypeError, ValueError):
        fixed = math.nan
    if not 0 <= fixed < math.inf:
        raise ConfigError(
            f"fp16.loss_scale={fp16['loss_scale']!r}: must be a number; use 0 for a dynamic one"
        )
    for name in ("loss_scale_window", "min_loss_scale"):
        value = fp16.get(name, 1)
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not whole or not math.isfinite(value) or (fp16.get("enabled") and value <= 0 == fixed):
            raise ConfigError(f"fp16.{name}={value!r}: use a positive number")


def _check_sums(config: Mapping[str, Any], compute: torch.dtype) -> None:
    """Raises ConfigError where data_types.grad_accum_dtype would change the sum over micro-batches,
    which is in float32 here. One micro-batch per update needs no sum."""
    name = config.get("data_types", {}).get("grad_accum_dtype")
    if name is None:
        return
    if name not in DTYPES:
        raise ConfigError(f"data_types.grad_accum_dtype={name!r}: use fp32, bf16 or fp16")
    summed = int(config.get("gradient_accumulation_steps") or 1) > 1
    stage = config.get("zero_optimization", {}).get("stage", 0)
    wrong = DTYPES[name] not in (torch.float32, compute) and not stage
    if wrong or (summed and name != "fp32"):
        raise ConfigError(
            f"data_types.grad_accum_dtype={name!r}: gradients are summed over micro-batches in "
            "float32; use fp32"
        )


_GATHER_ON_SAVE = (
    "gather_16bit_weights_on_model_save",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
"""the names that this one setting has had in DeepSpeed's versions"""
_MERGE_BELOW = ("param_persistence_threshold", "stage3_param_persistence_threshold")


_OLD_SWITCH = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    """Does the config keep the optimizer, or the weights, on the host?"""
    return bool(zero.get(_OLD_SWITCH[what])) or _section(zero, what).get("device") == "cpu"


def _section(zero: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Returns the section; {} where there is none or something else, which is refused elsewhere."""
    section = zero.get(what)
    return section if isinstance(section, Mapping) else {}


def _host(zero: Mapping[str, Any], stage: int) -> dict[str, bool]:
    """Returns what is kept in main memory beside a device. Without ZeRO 3 the weights never are."""
    if backend().device_type == "cpu":
        return {}
    weights = _offloads(zero, "offload_param")
    if weights and stage < 3:
        say_once(
            "config key zero_optimization.offload_param has no effect here: only ZeRO 3 has it, as "
            "in DeepSpeed"
        )
    weights = weights and stage == 3
    return {"offload": weights or _offloads(zero, "offload_optimizer"), "offload_param": weights}


def _zero(config: Mapping[str, Any]) -> dict[str, Any]:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={stage!r}: use 0, 1, 2 or 3")
    whole = [zero[k] for k in _MERGE_BELOW if zero.get(k) is not None]
    return {
        "stage": int(stage),
        **_host(zero, stage),
        "pin_memory": bool(zero.get("cpu_offload_use_pin_memory"))
        or any(_section(zero, what).get("pin_memory") for what in _OLD_SWITCH),
        "merge_below": int(whole[-1]) if whole else 100_000,
        "leaves": dict(zero.get("leaf_module") or {}),
        "all_used": zero.get("ignore_unused_parameters", True) is False
        and stage in (1, 2)
        and _offloads(zero, "offload_optimizer"),  # as in DeepSpeed
        "sanity_checks": bool(zero.get("enable_sanity_checks", False)),
        "bucket": int(zero.get("reduce_bucket_size", 500_000_000)),
        "load_masters": bool(zero.get("load_from_fp32_weights", True)),
        "gather_on_save": any(zero.get(k) for k in _GATHER_ON_SAVE),
    }


def _recipes(config: Mapping[str, Any]) -> dict[str, Any]:
    recipes: dict[str, Any] = {}
    for name in ("optimizer", "scheduler"):
        if (kind := config.get(name, {}).get("type")) is not None:
            recipes[name] = (str(kind), dict(config[name].get("params") or {}))
    return recipes


def _checkpoint(config: Mapping[str, Any]) -> dict[str, Any]:
    section = config.get("checkpoint", {})
    mode = str(section.get("tag_validation", "warn")).lower()
    if mode not in ("ignore", "warn", "fail"):
        raise ConfigError(
            f"checkpoint.tag_validation={section['tag_validation']!r}: use Ignore, Warn or Fail"
        )
    return {"tag_validation": mode, "load_universal": bool(section.get("load_universal", False))}


def _gradients(config: Mapping[str, Any]) -> dict[str, Any]:
    op = str(config.get("gradient_allreduce_op", "mean")).lower()
    if op not in ("mean", "sum"):
        raise ConfigError(f"gradient_allreduce_op={op!r}: use mean or sum")
    if op == "sum" and config.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            "gradient_allreduce_op=sum: is not available in ZeRO 3, as in DeepSpeed; use mean"
        )
    return {
        "clip": float(config.get("gradient_clipping", 1.0) or 0.0),
        "divide_by_ranks": op == "mean",
        "predivide": float(config.get("gradient_predivide_factor") or 1.0)
        if config.get("prescale_gradients")
        else 1.0,
    }
