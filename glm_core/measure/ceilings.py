"""Measures what this device reaches at most: matrix products by dtype, memory, launch and dispatch
latency. The peak is the published one where the backend knows it, else the measured one."""

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
"""launches of one round: many, since one takes less time than reading the clock"""


def sizes(backend: Backend) -> tuple[int, int]:
    """Returns (side of the square matrix product, bytes of the memory buffers). They exceed every
    cache and fill the device."""
    return (1024, 256 << 20) if backend.device_type == "cpu" else (8192, 2 << 30)


def contestants(
    backend: Backend, dtypes: Iterable[torch.dtype]
) -> dict[str, tuple[Call, float, float]]:
    """Returns by name (call, FLOPs, bytes)."""
    device, (side, nbytes) = backend.device(), sizes(backend)
    calls: dict[str, tuple[Call, float, float]] = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        moved = 3.0 * side * side * dtype.itemsize
        calls[f"gemm {name}"] = functools.partial(torch.mm, a, b), 2.0 * side**3, moved
    # ones, not zeros: pages that were never written are all read from one page
    source, target = (torch.ones(nbytes // 4, device=device) for _ in range(2))
    one = torch.ones(1, device=device)
    calls["memory read"] = source.sum, 0.0, float(nbytes)
    calls["memory write"] = (lambda: target.fill_(2.0)), 0.0, float(nbytes)
    calls["memory copy"] = (lambda: target.copy_(source)), 0.0, 2.0 * nbytes
    launch = functools.partial(one.add_, 1.0)
    calls[f"{LAUNCHES} launches, each waited for"] = _repeat(finished(backend, launch)), 0.0, 0.0
    calls[f"{LAUNCHES} launches, queued"] = _repeat(launch), 0.0, 0.0
    return calls


def _repeat(call: Call) -> Call:
    def run() -> None:
        for _ in range(LAUNCHES):
            call()

    return run


def measure(backend: Backend, dtypes: Iterable[torch.dtype], rounds: int) -> list[Row]:
    """Returns a row for each ceiling and for dispatch. The first matrix product is the peer of the
    others, so that two machines can be compared by their balance."""
    calls, watch = contestants(backend, dtypes), NoiseWatch()
    timing = interleave({k: finished(backend, c) for k, (c, _, _) in calls.items()}, rounds)
    facts, notes = machine_with_device(backend), watch.notes()
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
            machine=facts,
            figures=_launch(name, timing[name].median_s),
            notes=(*notes, *irregularities(timing[name].seconds)),
        )
        for name, (_, flops, moved) in calls.items()
    ]
    return [*rows, dispatch_row(rounds, facts)]


def dispatch_row(rounds: int, facts: dict[str, Any]) -> Row:
    """Returns the row of an op call through dispatch against its bare kernel. `facts` describe the
    machine."""
    watch = NoiseWatch()
    through, bare = dispatch.samples(rounds)
    return Row(
        bench="dispatch",
        key="dispatch",
        backend="cpu",
        dtype="float32",
        shape="1",
        machine=facts,
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
    """Returns the call with a wait for its device work."""

    def run() -> Any:
        result = call()
        backend.synchronize()
        return result

    return run if backend.device_type != "cpu" else call


def machine_with_device(backend: Backend) -> dict[str, Any]:
    """Returns the facts of `machine` and the device's name."""
    device_name = None
    if backend.device_type != "cpu":
        device_name = getattr(torch.get_device_module(backend.device_type), "get_device_name", None)
    return machine() | {"device": device_name() if device_name else backend.device_type}


def _slow(backend: Backend, dtype: torch.dtype) -> bool:
    """Tells by small matrices whether products of the dtype take more than twice float32's time:
    large ones would take seconds, as bfloat16 does on a CPU without units for it."""
    side, calls = sizes(backend)[0] // 8, {}
    for kind in (torch.float32, dtype):
        a, b = (torch.randn(side, side, device=backend.device()).to(kind) for _ in range(2))
        calls[str(kind)] = finished(backend, functools.partial(torch.mm, a, b))
    best = [min(t.seconds) for t in interleave(calls, 3).values()]
    return best[-1] > 2 * best[0]


def peak(backend: Backend, dtype: torch.dtype, rounds: int = 9) -> Peak:
    """Returns the published peak, else the best of a matrix product and a memory read, measured
    now. A dtype that the device multiplies more slowly than float32 (float16 on most CPUs) has
    float32's peak, because a kernel may convert."""
    if known := backend.peak(dtype):
        return known
    dtypes = (torch.float32,) if _slow(backend, dtype) else (torch.float32, dtype)
    calls = contestants(backend, dict.fromkeys(dtypes))
    chosen = {k: c for k, c in calls.items() if k.startswith("gemm") or k == "memory read"}
    timing = interleave({k: finished(backend, c) for k, (c, _, _) in chosen.items()}, rounds)
    best = {k: min(t.seconds) for k, t in timing.items()}
    side, nbytes = sizes(backend)
    tflops, name = max((chosen[k][1] / best[k] / 1e12, k) for k in chosen if k != "memory read")
    source = (
        f"measured here, best of {rounds}: {name} {side}x{side}x{side}, read of {nbytes >> 20} MiB"
    )
    return Peak(tflops, nbytes / best["memory read"] / 1e9, source)
