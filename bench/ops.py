"""Measures where every op lies under the roofline: the published shapes of its samples on every
usable backend, forward, and forward with backward, against the reference on the same device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend, Peak
from glm_core.backends.registry import use
from glm_core.conformance import perf
from glm_core.conformance.case import Case, select
from glm_core.measure import ceilings
from glm_core.measure.noise import NoiseWatch, irregularities
from glm_core.measure.rows import Row
from glm_core.measure.timing import interleave

LEAST_S = 1e-3
"""seconds that a round lasts at least; shorter ones measure the clock and cold caches"""
Skip = Callable[[str], None]
"""called with what is left out and why"""


def backends(names: Sequence[str]) -> list[Backend]:
    """Returns the named backends, or else every usable one that really computes."""
    if names:
        return [registry.usable(name) for name in names]
    usable = [registry.get(n) for n in registry.names() if registry.probe(n).ok]
    return [b for b in usable if b.device_type != "meta"]


def measure(
    names: Sequence[str], op: str | None, dtypes: Sequence[torch.dtype], rounds: int, skip: Skip
) -> Iterator[Row]:
    """Yields rows as they are measured."""
    peaks: dict[tuple[str, torch.dtype], Peak] = {}
    for backend in backends(names):
        machine = ceilings.machine_with_device(backend)
        for case in select(backend, modes=["perf"], op=op, dtypes=dtypes):
            where = (backend.device_type, case.dtype)
            if where not in peaks:
                peaks[where] = ceilings.peak(backend, case.dtype)
            support = backend.support(case.op, case.sample.make(case.dtype, backend.device()))
            if support.ok:
                yield from rows(case, backend, rounds, peaks[where], machine)
            else:
                skip(f"{backend.name} {case.id}: {support.reason}")


def rows(
    case: Case, backend: Backend, rounds: int, peak: Peak, machine: dict[str, Any]
) -> Iterator[Row]:
    """Measures one case, each direction against the reference in the same rounds."""
    for direction, flops, moved, calls in perf.calls(case, backend):
        watch = NoiseWatch()
        with use(backend):
            repeats = _repeats(calls["kernel"])
            timing = interleave({k: _repeated(c, repeats) for k, c in calls.items()}, rounds)
        seconds, peer = (
            tuple(s / repeats for s in timing[k].seconds) for k in ("kernel", "reference")
        )
        name = case.id.removesuffix("-perf")
        yield Row(
            bench="ops",
            key=f"{backend.name} {name} {direction}",
            backend=backend.name,
            dtype=str(case.dtype).removeprefix("torch."),
            shape=case.sample.id,
            seconds=seconds,
            peer="reference",
            peer_seconds=peer,
            flops=flops,
            bytes=moved,
            figures={"op": case.op.name, "direction": direction, "repeats": repeats},
            peak=peak._asdict(),
            notes=(*watch.notes(), *irregularities(seconds)),
            machine=machine,
        )


def _repeats(call: Callable[[], Any]) -> int:
    """Returns the number of calls for which a round lasts LEAST_S, by the time of a second call."""
    call()
    begin = time.perf_counter()
    call()
    return max(1, min(1000, math.ceil(LEAST_S / (time.perf_counter() - begin))))


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run
