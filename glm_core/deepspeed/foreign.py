"""Checkpoints that DeepSpeed (0.19.8) wrote, read without running anything in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_core.errors import CheckpointError

MODEL = "module"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
FACTS = {
    MODEL,
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    *COUNTERS,
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "checkpoint_parallel_dims",
    "universal_checkpoint_info",
}
"""keys that are DeepSpeed's; the others are the client's state"""


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint's content, independent of stage and ranks."""

    module: dict[str, Tensor]
    """whole weights"""
    state: dict[str, dict[str, Any]]
    """by parameter: fp32 (the master) and the optimizer's moments, whole and flat; numbers"""
    groups: list[dict[str, Any]]
    lr_scheduler: dict[str, Any] | None
    loss_scale: dict[str, Any]
    counters: dict[str, int]
    client: dict[str, Any]


def model_file(mp_rank: int) -> str:
    """Stages 0 to 2."""
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def model_file_3(dp_rank: int, mp_rank: int) -> str:
    """Stage 3, one per rank."""
    return f"zero_pp_rank_{dp_rank}_{model_file(mp_rank)}"


class _Inert:
    """In the place of every class of DeepSpeed's in a pickle: keeps what it is given, does
    nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_file(path: Path) -> dict[str, Any]:
    """`load_object` of a dict."""
    found = load_object(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a checkpoint: a {type(found).__name__}")
    return found


def load_object(path: Path) -> Any:
    """What torch.save wrote, with tensors on the CPU. Only tensors, containers and numbers are
    made; DeepSpeed's own classes become inert, any other class is refused. Raises
    CheckpointError."""
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign := [n for n in strange if not n.startswith("deepspeed.")]:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(sorted(foreign))}; only tensors, containers "
                "and DeepSpeed's own are read: save it again without them in the client state"
            )
        # a class of its own for each name: torch keeps one name per class
        known: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in strange]
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; copy all ranks' files, or use another tag"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({error})") from None
    except Exception as error:  # torch raises pickle.UnpicklingError, zipfile.BadZipFile, ...
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read safely ({error})") from None
    return found


def read(place: Path, facts: dict[str, Any], mp_rank: int, names: list[str]) -> Saved:
    """facts: the model file's content; names: parameters in the model's order (stage 0 saves its
    optimizer by position). Raises CheckpointError."""
    if MODEL not in facts or "ds_version" not in facts:
        raise CheckpointError(f"{place}: not written by DeepSpeed or glm_core.deepspeed")
    files = _optimizer_files(place, mp_rank)
    groups: list[dict[str, Any]] = []
    scaler: Any = None
    if files:
        parts = [load_file(f)["optimizer_state_dict"] for f in files]
        shapes = [dict(g) for g in facts["param_shapes"]]
        whole = "fp32_flat_groups" in parts[0]
        state = _stage_3(parts, shapes) if whole else _stage_1_2(parts, shapes)
        groups = _base(parts[0])["param_groups"]
        scaler = parts[0].get("loss_scaler")
    else:
        state, groups = _stage_0(facts, names)
    return saved(facts, state, groups, scaler)


def saved(
    facts: dict[str, Any],
    state: dict[str, dict[str, Any]],
    groups: list[dict[str, Any]],
    scaler: Any,
) -> Saved:
    """The model file's facts with what the optimizer's files told."""
    module = dict(facts[MODEL])
    for group in facts["param_shapes"] or []:
        for name, shape in group.items():
            if module.get(name) is None or module[name].shape != shape:  # stage 3 saves none
                module[name] = state[name]["fp32"].view(shape)
    return Saved(
        module,
        state,
        groups,
        facts.get("lr_scheduler"),
        _loss_scale(scaler),
        {n: facts[n] for n in COUNTERS},
        {k: v for k, v in facts.items() if k not in FACTS},
    )


def _optimizer_files(place: Path, mp_rank: int) -> list[Path]:
    found: dict[int, Path] = {}
    for path in place.glob(f"*zero_pp_rank_*_mp_rank_{mp_rank:02d}_optim_states.pt"):
        found[int(path.name.partition("rank_")[2].partition("_")[0])] = path
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{place}: optimizer files of ranks {sorted(found)} only; copy all")
    return [found[r] for r in range(len(found))]


def _base(part: Mapping[str, Any]) -> dict[str, Any]:
    """The wrapped torch optimizer's state dict."""
    found = part.get("base_optimizer_state") or part.get("optimizer_state_dict")
    if not isinstance(found, dict) or "param_groups" not in found:
        raise CheckpointError("optimizer state: an elastic checkpoint, which DeepSpeed retired")
    return found


def _loss_scale(scaler: Any) -> dict[str, Any]:
    """DeepSpeed's scaler object as our scale's state."""
    old = getattr(scaler, "__dict__", {})
    if not old.get("dynamic"):
        return {}
    return {
        "scale": old["cur_scale"],
        "window": old["scale_window"],
        "minimum": old["min_scale"],
        "hysteresis": old["delayed_shift"],
        "left": old["cur_hysteresis"],
        "steps": old["cur_iter"],
        "last_overflow": old["last_overflow_iter"],
    }


def _stage_1_2(parts: list[Any], shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each group is one flat vector in the order of param_shapes, cut into equal parts of which the
    last end in padding."""
    state: dict[str, dict[str, Any]] = {}
    for g, group in enumerate(shapes):
        keys = {"fp32": [p["single_partition_of_fp32_groups"][g] for p in parts]}
        own = [_base(p)["state"].get(g, {}) for p in parts]
        numbers = _collect(keys, own)
        whole = {k: torch.cat([v.reshape(-1) for v in vs]) for k, vs in keys.items()}
        at = 0
        for name, shape in group.items():
            size = math.prod(shape)
            state[name] = {k: v[at : at + size] for k, v in whole.items()} | numbers
            at += size
    return state


def _stage_3(parts: list[Any], shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every parameter is cut into equal parts of its own; a rank's parts follow one another."""
    keys: dict[str, list[Tensor]] = {"fp32": [torch.cat(p["fp32_flat_groups"]) for p in parts]}
    subgroups = range(len(parts[0]["fp32_flat_groups"]))
    numbers: dict[str, Any] = {}
    for i in subgroups:
        more: dict[str, list[Tensor]] = {}
        numbers |= _collect(more, [_base(p)["state"].get(i, {}) for p in parts])
        for k, vs in more.items():
            keys[k] = [torch.cat([a, b]) for a, b in zip(keys[k], vs, strict=True)] if i else vs
    state: dict[str, dict[str, Any]] = {}
    at = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        size = math.prod(shape)
        each = -(-size // len(parts))
        state[name] = {
            k: torch.cat([v[at : at + each] for v in vs])[:size] for k, vs in keys.items()
        } | numbers
        at += each
    return state


def _collect(keys: dict[str, list[Tensor]], states: list[dict[str, Any]]) -> dict[str, Any]:
    """Moments, one vector per rank, into `keys`; what is a number is returned."""
    numbers: dict[str, Any] = {}
    for key, first in (states[0] if states else {}).items():
        if isinstance(first, Tensor) and first.numel() > 1:
            keys[key] = [s[key].reshape(-1) for s in states]
        else:
            numbers[key] = first
    return numbers


def _stage_0(
    facts: dict[str, Any], names: list[str]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """A plain torch optimizer's state, by position: parameters in the model's order."""
    optimizer = facts.get("optimizer")
    state: dict[str, dict[str, Any]] = {
        n: {"fp32": t.float().reshape(-1)} for n, t in facts[MODEL].items() if n in names
    }
    if not isinstance(optimizer, dict):
        return state, []
    if "param_groups" not in optimizer:
        raise CheckpointError(
            "optimizer state: of DeepSpeed's stage 0 in 16 bit, which is not read; pass "
            "load_module_only=True, or save it with ZeRO 1"
        )
    for index, values in optimizer["state"].items():
        flat = {k: v.reshape(-1) if getattr(v, "ndim", 0) else v for k, v in values.items()}
        state[names[index]].update(flat)
    return state, list(optimizer["param_groups"])
