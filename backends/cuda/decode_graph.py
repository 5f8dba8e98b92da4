"""Takes whole decode steps by replaying a recording of their kernels: one launch a token, whatever
the position (docs/adr/0014-decoding-on-a-gpu.md). No GPU has replayed one yet: tests record and
replay on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.backends.cuda.decode_ops import Inputs, Step, inputs, packed
from glm_core.backends.graphs import Graphs, Work
from glm_core.decode_step import Rows, Stack

MAX_ROWS = 1024


class CudaGraphs:
    """Graphs of torch.cuda, for CUDA and HIP. All share one pool of memory: only one runs at a
    time, and its result is copied before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def warm_up(self, work: Work) -> Tensor:
        """See Graphs."""
        with torch.cuda.device(self._device):
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                result = work()
            main.wait_stream(side)
            result.record_stream(main)
        return result

    def record(self, work: Work) -> tuple[Tensor, Callable[[], None]]:
        """See Graphs. Other threads may go on using the device."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = work()
        self._pool = self._pool or graph.pool()
        return result, graph.replay


class Recorded(NamedTuple):
    """A recorded step for one number of rows."""

    fed: Inputs
    logits: Tensor
    replay: Callable[[], None]


class GraphDecodeStep:
    """Decode steps of one model. A step with a new number of rows, or in a new cache, runs op by op
    and is recorded; later ones are replayed."""

    max_rows = MAX_ROWS

    def __init__(self, stack: Stack, graphs: Graphs) -> None:
        self._stack, self._graphs = stack, graphs
        self._step = Step(stack)
        self._recorded: dict[int, Recorded] = {}
        self._cache: Tensor | None = None
        self._refusal = ""
        """why nothing is recorded any more; '' while it is"""

    def __call__(self, rows: Rows, cache: Tensor) -> Tensor:
        """See DecodeStep."""
        self._check(rows, cache)
        if self._cache is None or _place(cache) != _place(self._cache):
            self._recorded, self._cache = {}, cache
        with torch.no_grad():
            recorded = self._recorded.get(len(rows.tokens))
            if recorded is None:
                return self._first(rows, cache)
            recorded.fed.memory.copy_(packed(rows))
            recorded.replay()
            return recorded.logits.clone()

    def _first(self, rows: Rows, cache: Tensor) -> Tensor:
        """Runs the step, then records it unless an op fell back to its reference, which may wait
        for the device or count on its values."""
        fed, session = inputs(packed(rows).to(cache.device)), dispatch.session()

        def work() -> Tensor:
            return self._step(fed, cache)

        fallbacks = session.fallbacks.total()
        logits = self._graphs.warm_up(work)
        reason = self._refusal
        if session.fallbacks.total() > fallbacks:
            reason = "an op fell back to its reference; only kernels are recorded"
        if reason:
            session.decoded_op_by_op(reason)
            return logits
        try:
            self._recorded[len(rows.tokens)] = Recorded(fed, *self._graphs.record(work))
        except RuntimeError as error:
            self._refusal = f"the step could not be recorded: {str(error).splitlines()[0]}"
            session.decoded_op_by_op(self._refusal)
        return logits

    def _check(self, rows: Rows, cache: Tensor) -> None:
        """Raises IndexError for what lies outside of the model or the cache: a kernel would end the
        process, or write over another sequence."""
        length = cache.shape[4]
        for name, values, size in (
            ("token", rows.tokens, len(self._stack.embedding)),
            ("position", rows.positions, self._step.num_positions),
            ("place", rows.places, length),
            ("key_start", rows.key_start, length + 1),
            ("key_end", rows.key_end, length + 1),
        ):
            for i, value in enumerate(values):
                if not 0 <= value < size:
                    row = i // 2 if name == "position" else i
                    raise IndexError(f"{name} {value} of row {row}: must lie in [0, {size})")
        if len(rows.tokens) > cache.shape[2]:
            raise IndexError(f"{len(rows.tokens)} rows: the cache has {cache.shape[2]} slots")


def _place(memory: Tensor) -> tuple[int, torch.Size]:
    return memory.data_ptr(), memory.shape
