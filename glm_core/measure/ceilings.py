"""What this device reaches at most: matrix products by dtype, memory, launch and dispatch latency.
A published peak is used where the backend knows one; else what was measured here is the peak."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from glm_core.backends.base import Backend, Peak
from glm_core.measure import dispatch
from glm_core.measure.noise import NoiseWatch, irregularities
from glm_core.measure.rows import Row
from glm_core.measure.timing import interleave, machine

Call = Callable[[], Any]
LAUNCHES = 100
"""queued in one round, so that a launch costs less than reading the clock"""


def sizes(backend: Backend) -> tuple[int, int]:
    """(side of the square matrix product, bytes of the memory buffers): past every cache and long
    enough to fill the device."""
    return (1024, 256 << 20) if backend.device_type == "cpu" else (8192, 2 << 30)


def contestants(
    backend: Backend, dtypes: Iterable[torch.dtype]
) -> dict[str, tuple[Call, float, float]]:
    """name: (call, FLOPs, bytes)."""
    device, (side, nbytes) = backend.device(), sizes(backend)
    found: dict[str, tuple[Call, float, float]] = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        moved = 3.0 * side * side * dtype.itemsize
        found[f"gemm {name}"] = functools.partial(torch.mm, a, b), 2.0 * side**3, moved
    # ones, not zeros: pages never written all read as one
    source, target = (torch.ones(nbytes // 4, device=device) for _ in range(2))
    one = torch.ones(1, device=device)
    found["memory read"] = source.sum, 0.0, float(nbytes)
    found["memory write"] = (lambda: target.fill_(2.0)), 0.0, float(nbytes)
    found["memory copy"] = (lambda: target.copy_(source)), 0.0, 2.0 * nbytes
    launch = functools.partial(one.add_, 1.0)
    found[f"{LAUNCHES} launches, each waited for"] = _repeat(finished(backend, launch)), 0.0, 0.0
    found[f"{LAUNCHES} launches, queued"] = _repeat(launch), 0.0, 0.0
    return found


def _repeat(call: Call) -> Call:
    def run() -> None:
        for _ in range(LAUNCHES):
            call()

    return run


def measure(backend: Backend, dtypes: Iterable[torch.dtype], rounds: int) -> list[Row]:
    """A row for each ceiling and for dispatch; the first matrix product is the others' peer, so
    that two machines can be compared by their balance."""
    calls, watch = contestants(backend, dtypes), NoiseWatch()
    timing = interleave({k: finished(backend, c) for k, (c, _, _) in calls.items()}, rounds)
    told, notes = machine_with_device(backend), watch.notes()
    peer = next(iter(calls))
    rows = [
        Row(
            bench="ceilings",
            key=f"ceilings {name}",
            backend=backend.name,
            dtype=name.removeprefix("gemm ") if name.startswith("gemm") else "float32",
            shape=_shape(name, backend),
            seconds=timing[name].seconds,
            peer="" if name == peer else peer,
            peer_seconds=() if name == peer else timing[peer].seconds,
            flops=flops,
            bytes=moved,
            machine=told,
            figures=_launch(name, timing[name].median_s),
            notes=(*notes, *irregularities(timing[name].seconds)),
        )
        for name, (_, flops, moved) in calls.items()
    ]
    return [*rows, dispatch_row(rounds, told)]


def dispatch_row(rounds: int, told: dict[str, Any]) -> Row:
    """Seconds that one op call spends in dispatch, against its bare kernel."""
    watch = NoiseWatch()
    through, bare = dispatch.samples(rounds)
    return Row(
        bench="dispatch",
        key="dispatch",
        backend="cpu",
        dtype="float32",
        shape="1",
        machine=told,
        seconds=tuple(through),
        peer="bare kernel",
        peer_seconds=tuple(bare),
        figures=dispatch.overhead(through, bare),
        notes=tuple(watch.notes()),
    )


def _launch(name: str, seconds: float) -> dict[str, float]:
    return {"launch_us": seconds / LAUNCHES * 1e6} if "launches" in name else {}


def _shape(name: str, backend: Backend) -> str:
    side, nbytes = sizes(backend)
    if name.startswith("gemm"):
        return f"{side}x{side}x{side}"
    return f"{nbytes >> 20} MiB" if name.startswith("memory") else "1"


def finished(backend: Backend, call: Call) -> Call:
    """The call with its device work waited for."""

    def run() -> Any:
        result = call()
        backend.synchronize()
        return result

    return run if backend.device_type != "cpu" else call


def machine_with_device(backend: Backend) -> dict[str, Any]:
    """`machine` with the device's name."""
    named = None
    if backend.device_type != "cpu":
        named = getattr(torch.get_device_module(backend.device_type), "get_device_name", None)
    return machine() | {"device": named() if named else backend.device_type}


def peak(backend: Backend, dtype: torch.dtype, rounds: int = 9) -> Peak:
    """Published, else the best of a matrix product and of a memory read, measured now. A dtype
    that the device multiplies slower than float32 (float16 on most CPUs) has float32's peak, for a
    kernel may convert."""
    if known := backend.peak(dtype):
        return known
    calls = contestants(backend, dict.fromkeys((torch.float32, dtype)))
    chosen = {k: c for k, c in calls.items() if k.startswith("gemm") or k == "memory read"}
    timing = interleave({k: finished(backend, c) for k, (c, _, _) in chosen.items()}, rounds)
    best = {k: min(t.seconds) for k, t in timing.items()}
    side, nbytes = sizes(backend)
    tflops, name = max((chosen[k][1] / best[k] / 1e12, k) for k in chosen if k != "memory read")
    source = (
        f"measured here, best of {rounds}: {name} {side}x{side}x{side}, read of {nbytes >> 20} MiB"
    )
    return Peak(tflops, nbytes / best["memory read"] / 1e9, source)
