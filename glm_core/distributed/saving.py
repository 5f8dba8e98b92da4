"""What of an engine goes into a checkpoint, so that a run under any other plan, or on one process,
goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm_core.distributed.checkpoint import (
    Checkpoints,
    Shards,
    find_checkpoint,
    read_facts,
    shards_of,
)
from glm_core.distributed.engine import Engine
from glm_core.distributed.layout import split_of
from glm_core.training import checkpoint as single


def state(engine: Engine) -> dict[str, Shards]:
    """Masters and moments by `master.NAME`, `exp_avg.NAME`, ...: views of this process's part, each
    with its place in the whole."""
    tp, rank = engine.plan.tp, engine.mesh.get_local_rank("tp")
    found = {}
    for key, own in engine.optimizer.state()["tensors"].items():
        name = key.partition(".")[2]
        split = split_of(name, engine.config.model, tp, rank) if tp > 1 else None
        found[key] = shards_of(engine.optimizer.trained[name], split, tp, own)
    return found


def save(engine: Engine, checkpoints: Checkpoints, sampler: dict[str, Any]) -> Path:
    """Begins to write a checkpoint of now. sampler: its state; the place in the data is a global
    sequence number, whatever the plan. Raises CheckpointError as `Checkpoints.save`."""
    facts = {**engine.facts(), "plan": engine.plan.label(), "sampler": sampler}
    return checkpoints.save(engine.steps_done, state(engine), facts)


def restore(engine: Engine, checkpoints: Checkpoints, path: Path) -> dict[str, Any]:
    """The engine goes on where the checkpoint was taken, whatever plan that was under; returns the
    sampler's state. Raises CheckpointError for another run's."""
    path = find_checkpoint(path)
    single.require_same(read_facts(path)["config"], engine.config, path)
    facts = checkpoints.load(path, state(engine))
    engine.restore_facts(facts, engine.optimizer.state()["tensors"])
    sampler: dict[str, Any] = facts["sampler"]
    return sampler
