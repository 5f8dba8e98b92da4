"""What an engine's checkpoint is: weights in one file, each rank's masters and moments in its own,
as runs of named parameters, so that any stage and number of ranks can read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm_core.deepspeed import foreign, universal
from glm_core.deepspeed.foreign import MODEL, Saved
from glm_core.deepspeed.settings import say_once
from glm_core.distributed.placement import flat
from glm_core.errors import CheckpointError
from glm_core.training.checkpoint import LATEST, replace

if TYPE_CHECKING:
    from glm_core.deepspeed.engine import DeepSpeedEngine

FORMAT = "glm-core deepspeed checkpoint 1"


def save(
    engine: DeepSpeedEngine, folder: str, tag: str | None, client: dict[str, Any], latest: bool
) -> None:
    """Writes `folder/tag/`; `latest` is moved last, when every rank has written. Raises
    CheckpointError on every rank if any could not write."""
    name = tag or f"global_step{engine.global_steps}"
    _same_tag(engine, name)
    place = Path(folder) / name
    weights = full_weights(engine)
    mine = {
        "format": FORMAT,
        "mp_rank": mp_rank(engine),
        "pieces": pieces(engine),
        "groups": groups(engine),
    }
    problem = ""
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(place / f"glm_core_rank_{dist.get_rank():05d}.pt", mine)
        if dist.get_rank(engine.dp_group) == 0:
            _write(place / foreign.model_file(mp_rank(engine)), _facts(engine, weights, client))
    except OSError as error:
        problem = f"{place}: not saved ({error}); make room, then save again"
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    if bad := [t for t in told if t]:
        raise CheckpointError(bad[0])
    if latest and dist.get_rank() == 0:
        replace(Path(folder) / LATEST, lambda part: part.write_text(name))
    dist.barrier()


def _write(path: Path, value: Any) -> None:
    # a folder of one's own per rank: `replace` clears its scratch folder
    scratch = path.with_suffix(".part")
    torch.save(value, scratch)
    scratch.rename(path)


def mp_rank(engine: DeepSpeedEngine) -> int:
    """The number in the name of this rank's model file."""
    return 0 if engine.mpu is None else int(engine.mpu.get_model_parallel_rank())


def _slice(engine: DeepSpeedEngine) -> int:
    """The tensor-parallel rank: whose parts of the same weights go together."""
    mpu = engine.mpu
    if mpu is None:
        return 0
    return int(getattr(mpu, "get_slice_parallel_rank", mpu.get_model_parallel_rank)())


def _same_tag(engine: DeepSpeedEngine, tag: str) -> None:
    mode = engine.settings.tag_validation
    if mode == "ignore":
        return
    tags: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(tags, hashlib.sha256(tag.encode()).hexdigest())
    if len(set(tags)) > 1:
        text = f"checkpoint tag {tag!r}: not the same on all ranks; give one tag"
        if mode == "fail":
            raise CheckpointError(text)
        say_once(text)


def full_weights(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The module's state dict with whole tensors on the CPU; a collective in stage 3."""
    state = {}
    for name, value in engine.module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if engine.settings.stage == 3 and whole.is_floating_point():
            whole = whole.to(engine.settings.precision.compute)
        state[name] = whole.detach().cpu()
    return state


def _facts(
    engine: DeepSpeedEngine, weights: dict[str, Any], client: dict[str, Any]
) -> dict[str, Any]:
    scheduler = engine.lr_scheduler
    own = {
        "format": FORMAT,
        "module": weights,
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "loss_scale": engine.scaler.state(),
        "writers": dist.get_world_size(),
        "slice": _slice(engine),
        "stages": engine.num_stages,
        **{n: getattr(engine, n) for n in foreign.COUNTERS},
    }
    if shadowed := sorted(own.keys() & client.keys()):
        raise CheckpointError(f"client_state: {', '.join(shadowed)}: reserved; rename them")
    return {**own, "client_state": client}


def pieces(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """This rank's runs: parameter, start, and of those elements the master and what of the
    optimizer's state is shaped like it; numbers of the state as they are."""
    found = []
    assert engine.optimizer is not None or not engine.holders
    for holder in engine.holders:
        for span in holder.spans():
            values: dict[str, Any] = {"fp32": flat(span.master)[span.of_master].cpu().clone()}
            state = engine.optimizer.state.get(span.master, {}) if engine.optimizer else {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == span.master.shape:
                    values[key] = flat(value)[span.of_master].cpu().clone()
                else:
                    values[key] = value
            found.append({"name": engine.names[span.param], "start": span.start, "values": values})
    return found


def groups(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with their parameters' names."""
    if engine.optimizer is None:
        return []
    return [
        {**g, "params": [engine.names[p] for p in h.params]}
        for h, g in zip(engine.holders, engine.optimizer.param_groups, strict=True)
    ]


def load(
    engine: DeepSpeedEngine,
    folder: str,
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    scheduler: bool,
    only_module: bool,
    custom: Callable[..., Any] | None,
) -> tuple[str | None, dict[str, Any]]:
    """See DeepSpeedEngine.load_checkpoint."""
    if tag is None:
        latest = universal.LATEST if engine.settings.load_universal else LATEST
        try:
            tag = (Path(folder) / latest).read_text().strip()
        except FileNotFoundError:
            if engine.settings.load_universal:
                raise CheckpointError(f"{folder}: no {latest} file; pass tag=") from None
            say_once(f"{folder}: no {latest} file, nothing loaded; pass tag=")
            return None, {}
    place = Path(folder) / tag
    saved = engine.read_checkpoint(place)
    set_weights(engine, saved.module, strict, custom)
    if not only_module:
        masters = saved.state if engine.settings.load_masters else {}
        restore(engine, masters, saved.groups if optimizer else None)
        if optimizer and saved.loss_scale:
            engine.scaler.restore(saved.loss_scale)
        for name, value in saved.counters.items():
            setattr(engine, name, value)
    if scheduler and saved.lr_scheduler is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved.lr_scheduler)
    return str(place), saved.client


def read(place: Path, mp_rank: int, names: list[str]) -> Saved:
    """A checkpoint's content, ours or DeepSpeed's. Raises CheckpointError."""
    path = place / foreign.model_file(mp_rank)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such checkpoint; `latest` or tag= must name a folder")
    facts = foreign.load_file(path if path.exists() else place / foreign.model_file_3(0, mp_rank))
    if universal.is_universal(place):
        return universal.read(place, facts)
    if facts.get("format") != FORMAT:
        return foreign.read(place, facts, mp_rank, names)
    if facts["stages"] > 1:
        raise CheckpointError(f"{place}: of a pipeline; load it into a PipelineModule")
    return read_ours(place, {mp_rank: facts})


def read_ours(place: Path, every: dict[int, dict[str, Any]]) -> Saved:
    """every: by model-parallel rank, what the model files to be merged hold; of a weight that
    several hold the last is taken. Raises CheckpointError."""
    facts = next(iter(every.values()))
    if len(every) != facts["stages"]:
        raise CheckpointError(
            f"{place}: {len(every)} of {facts['stages']} stages' files are there; use another tag"
        )
    files = sorted(place.glob("glm_core_rank_*.pt"))
    if len(files) != facts["writers"]:
        raise CheckpointError(
            f"{place}: {len(files)} of {facts['writers']} ranks' files are there; use another tag"
        )
    order = list(every)
    parts = [p for p in map(foreign.load_file, files) if p["mp_rank"] in every]
    parts.sort(key=lambda p: order.index(p["mp_rank"]))
    module = {name: value for own in every.values() for name, value in own[MODEL].items()}
    each = parts if len(every) > 1 else parts[:1]
    counters = {n: facts[n] for n in foreign.COUNTERS}
    return Saved(
        module,
        assemble([p for part in parts for p in part["pieces"]], module),
        [g for part in each for g in part["groups"]],
        facts["lr_scheduler"],
        facts["loss_scale"],
        counters,
        facts["client_state"],
    )


def assemble(runs: list[dict[str, Any]], weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Whole flat tensors by parameter and key, from all ranks' runs."""
    whole: dict[str, dict[str, Any]] = {}
    for run in runs:
        mine = whole.setdefault(run["name"], {})
        count = len(run["values"]["fp32"])
        for key, value in run["values"].items():
            if isinstance(value, Tensor) and value.ndim == 1 and len(value) == count:
                if key not in mine:
                    mine[key] = torch.zeros(weights[run["name"]].numel(), dtype=value.dtype)
                mine[key][run["start"] : run["start"] + count] = value
            else:
                mine[key] = value
    return whole


@torch.no_grad()
def set_weights(
    engine: DeepSpeedEngine,
    weights: dict[str, Tensor],
    strict: bool,
    custom: Callable[..., Any] | None,
) -> None:
    """Whole weights into the module, whatever its stage, and from them the masters."""
    if engine.settings.stage != 3 or custom is not None:
        engine.load_module_state_dict(weights, strict, custom)
        return
    own = engine.module.state_dict()
    if strict and (odd := sorted(own.keys() ^ weights.keys())):
        raise CheckpointError(f"checkpoint: does not fit this model: {', '.join(odd[:5])}")
    for name, target in own.items():
        if name in weights and not isinstance(target, DTensor):
            target.copy_(weights[name])
    for holder in engine.holders:
        for span in holder.spans(every_rank=True):
            run = weights[engine.names[span.param]].reshape(-1)[span.start :]
            part = flat(span.master)[span.of_master]
            part.copy_(run[: len(part)])


@torch.no_grad()
def restore(
    engine: DeepSpeedEngine,
    state: dict[str, dict[str, Any]],
    saved_groups: list[dict[str, Any]] | None,
) -> None:
    """Masters, and unless saved_groups is None the optimizer's moments and groups."""
    optimizer = engine.optimizer
    for holder in engine.holders:
        for span in holder.spans(every_rank=True):
            values = state.get(engine.names[span.param], {})
            whole = {k: v for k, v in values.items() if saved_groups is not None or k == "fp32"}
            for key, value in whole.items():
                _restore_one(engine, span, key, value)
        holder.publish()
    if optimizer is not None and saved_groups is not None:
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})


def _restore_one(engine: DeepSpeedEngine, span: Any, key: str, value: Any) -> None:
    master, where = span.master, span.of_master
    is_run = isinstance(value, Tensor) and value.numel() == engine.sizes[span.param]
    if key == "fp32":
        part = flat(master)[where]
        part.copy_(value.reshape(-1)[span.start : span.start + len(part)])
        return
    assert engine.optimizer is not None
    state = engine.optimizer.state[master]
    if is_run and not (isinstance(value, Tensor) and value.ndim == 0):
        if key not in state:
            state[key] = torch.zeros_like(master, dtype=value.dtype)
        part = flat(state[key])[where]
        part.copy_(value.reshape(-1)[span.start : span.start + len(part)])
    else:
        state[key] = value.clone() if isinstance(value, Tensor) else value


def save_weights(engine: DeepSpeedEngine, folder: str, name: str) -> None:
    """See DeepSpeedEngine.save_16bit_model."""
    weights = full_weights(engine)
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(weights, Path(folder) / name)
    dist.barrier()
