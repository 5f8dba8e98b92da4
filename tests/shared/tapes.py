"""Stands in for a GPU's graphs on the CPU. A tape replays the recorded operators with the same
tensors, so whatever they took from Python or from a tensor's value stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "lift_fresh", "is_nonzero")
"""operators that read a tensor's value or bring one from the host, which no graph can do"""


class Tape(TorchDispatchMode):
    """Records the operators that are called, and calls them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.name.partition("::")[2] in WAITS:
            raise RuntimeError(f"{func} waits for the device while a graph is recorded")
        result = func(*args, **(kwargs or {}))

        def again() -> None:
            for new, old in zip(
                tree_leaves(func(*args, **(kwargs or {}))), tree_leaves(result), strict=True
            ):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return result


class Tapes:
    """Counts what is recorded and replayed. `untouched` returns what the work adds to: a recording
    leaves it as it was."""

    def __init__(self, untouched: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self.recorded = self.replayed = 0
        self._untouched = untouched

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        before = [(x, x.clone()) for x in self._untouched()]
        with Tape() as tape:
            result = work()
        for x, value in before:
            x.copy_(value)
        result.fill_(torch.nan)  # a recording computes nothing
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch._C._AutoDispatchBelowAutograd():  # the recorded views have histories
                for call in tape.calls:
                    call()

        return result, replay
