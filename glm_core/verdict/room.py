"""Judges a call in the memory that the host has: smaller parts of it where memory is short, nothing
where even those do not fit."""

from __future__ import annotations

import torch

from glm_core.errors import NoRoomError
from glm_core.measure import memory
from glm_core.verdict import slices
from glm_core.verdict.judge import Judgement, judge
from glm_core.verdict.oracle import Call, Results

COPIES = 10
"""float64 copies of a call's tensors that judging it holds at once, about"""
SMALL = 1 << 20
"""a call with fewer elements is judged without a look at the memory"""
SHARES = (1, 16, 256)
"""a part may have LARGE elements divided by one of these"""


def judge_in_room(call: Call, actual: Results, seed: int, z: float) -> tuple[Judgement, bool]:
    """Judges a call, or random parts of a large one. Returns the judgement and whether the parts
    are smaller than usual. Raises NoRoomError where no part fits."""
    needed = 0
    for share in SHARES:
        smaller, results = slices.part(call, actual, seed, slices.LARGE // share)
        smaller, results = slices.columns(smaller, results, seed, _factor(share))
        size = sum(t.numel() for t in (*smaller.tensors(), *results.values()))
        needed = 8 * COPIES * size
        free = memory.host_free_bytes() if size > SMALL else None
        if free is not None and needed > free:
            continue
        try:
            return judge(smaller, results, z), share > 1
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
    raise NoRoomError(
        f"too little memory on the host, even for a small part: about {needed >> 20} MiB"
    )


def _factor(share: int) -> int:
    """Returns how many elements the second factor of a product may have."""
    return slices.LARGE // share if share > 1 else 1 << 62


def out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that memory is short; torch's CPU allocator raises a plain
    RuntimeError."""
    text = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "out of memory" in text or "not enough memory" in text
