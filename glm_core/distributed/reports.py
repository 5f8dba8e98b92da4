"""Gives rank 0 what every rank of a job has to report, through the job's store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

PATIENCE_S = 300.0
"""so long a rank waits for the report of another one"""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """The job that this process is a rank of. It outlives the program's process groups."""

    rank: int
    world: int
    store: Any
    """the job's, by which its ranks know each other"""

    def in_words(self) -> str:
        """Returns `rank 1 of 4`."""
        return f"rank {self.rank} of {self.world}"

    def gathered(self, text: str) -> list[str | None] | None:
        """Returns the text of every rank on rank 0, with None for a rank that gave none in time;
        None on the other ranks, once rank 0 has read theirs. A process calls this once."""
        place = "glm_core.verdict/report"
        keys = [f"{place}/{rank}" for rank in range(self.world)]
        if self.rank:
            self.store.set(keys[self.rank], text)
            self._wait(f"{place}/read", self.world * PATIENCE_S)
            return None
        texts: list[str | None] = [text]
        for key in keys[1:]:
            texts.append(self.store.get(key).decode() if self._wait(key, PATIENCE_S) else None)
        self.store.set(f"{place}/read", "")
        return texts

    def _wait(self, key: str, seconds: float) -> bool:
        """Waits for a key; returns whether it came."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True


def job() -> Job | None:
    """Returns the job of the program's process groups, None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return Job(dist.get_rank(), dist.get_world_size(), c10d._get_default_store())


@contextmanager
def keys_apart(run: int) -> Iterator[None]:
    """Gives the process groups that are made in the block keys of their own in the job's store.
    The store of torchrun outlives a run of the program, and a second run would read what the first
    one left."""
    module: Any = c10d
    plain = module.rendezvous

    def rendezvous(*args: Any, **kwargs: Any) -> Any:
        for store, rank, world in plain(*args, **kwargs):
            yield module.PrefixStore(f"glm_core.verdict/run {run}", store), rank, world

    module.rendezvous = rendezvous
    try:
        yield
    finally:
        module.rendezvous = plain
