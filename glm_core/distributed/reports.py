"""Gives rank 0 what every rank of a job has to report, through the job's store."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

PATIENCE_S = 300.0
"""so long rank 0 waits for the report of another rank"""


def num_ranks() -> int:
    """Returns the number of ranks of the job, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(text: str) -> list[str | None] | None:
    """Returns the text of every rank on rank 0, with None for a rank that gave none in time; None
    on the other ranks."""
    store = c10d._get_default_store()
    keys = [f"glm_core.verdict/report/{rank}" for rank in range(num_ranks())]
    if dist.get_rank():
        store.set(keys[dist.get_rank()], text)
        return None
    texts: list[str | None] = [text]
    for key in keys[1:]:
        try:
            store.wait([key], timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            texts.append(None)
        else:
            texts.append(store.get(key).decode())
    return texts
