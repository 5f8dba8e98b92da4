"""Checks that an update begins with the masters and moments that the update before it left. What
happens to them in between is no op's: masters kept in a lower precision, moments that are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from glm_core.align.statistics import EPS
from glm_core.align.verdict import AS_IT_HAPPENED, BETWEEN_UPDATES
from glm_core.align.worst_tests import with_tests
from glm_core.training.optimizer import Optimizer

KINDS = {"master": "params", "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}
"""the optimizer's tables, and the arguments of the op `adamw` that they become"""


class Carried:
    """The state that an optimizer's last update left, by table and parameter."""

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}
        self.changes: dict[str, tuple[int, int, float]] = {}
        """by table, in the first update that began with other values: the number of that update,
        the elements looked at, and the change relative to all of them"""

    @contextmanager
    def watching(self, optimizer: Optimizer) -> Iterator[None]:
        """Watches the updates inside the block."""
        update = optimizer._update

        def watched(names: list[str], *rest: Any) -> None:
            state = {f"{t}.{n}": getattr(optimizer, t)[n] for t in KINDS for n in names}
            self._compare(state, optimizer.step_count)
            update(names, *rest)
            self.left |= {key: x.detach().cpu().clone() for key, x in state.items()}

        optimizer._update = watched  # type: ignore[method-assign, assignment]  # undone below
        try:
            yield
        finally:
            del optimizer._update

    def _compare(self, state: dict[str, Tensor], step: int) -> None:
        for table in KINDS.keys() - self.changes.keys():
            keys = [key for key in state if key.startswith(f"{table}.") and key in self.left]
            if all(torch.equal(state[key].cpu(), self.left[key]) for key in keys):
                continue
            now, before = (
                torch.cat([values[key].cpu().double().flatten() for key in keys])
                for values in (state, self.left)
            )
            change = float((now - before).norm() / before.norm().clamp(min=1e-30))
            self.changes[table] = step, len(now), change

    def added_to(self, taught: dict[str, Any]) -> dict[str, Any]:
        """Returns a trace's fields of teacher forcing with the changes as tests of `adamw`. Each
        may be one unit of float32: an update is allowed no change at all."""
        tests = [
            {
                "op": "adamw",
                "direction": "forward",
                "tensor": KINDS[table],
                "layer": "",
                "step": step,
                "call": 0,
                "shape": [size],
                "projection": f"size{BETWEEN_UPDATES}{AS_IT_HAPPENED}",
                "dtype": "float32",
            }
            for table, (step, size, _) in self.changes.items()
        ]
        values = [[change, 0.0, EPS] for _, _, change in self.changes.values()]
        return with_tests(taught, tests, values)
