"""Measures the links between ranks and prints the columns of nccl-tests. Run `torchrun
--nproc-per-node 8 -m glm_core.bench.comm`, or without torchrun on processes of its own.

algbw = S / t and busbw = algbw x factor, where S is the bytes of the whole array (nccl-tests
doc/PERFORMANCE.md, "Bandwidth"); the factor of point-to-point is 1 (src/sendrecv.cu). t is the
median over the rounds of the slowest rank's time."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.distributed import comm, launch
from glm_core.errors import ConfigError, GlmCoreError, TrainingError
from glm_core.measure.timing import Timing, interleave, machine

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}
"""by torch's name: nccl-tests' name"""
ALIGNMENT = 16
"""a rank's share is a multiple of so many bytes, as in nccl-tests' *GetCollByteCount"""
HEAD = (
    "#       size         count      type   redop    root     time   algbw   busbw  #wrong\n"
    "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)        "
)


def bus_factor(name: str, world: int) -> float:
    """Returns busbw / algbw."""
    share = (world - 1) / world
    return {"all_reduce": 2 * share, "p2p": 1.0}.get(name, share)


def elements(size_bytes: int, itemsize: int, world: int) -> int:
    """Returns the elements of the whole array: the largest number that does not exceed `size_bytes`
    and gives each rank an aligned share; at least one alignment each."""
    aligned = max(1, size_bytes // world // ALIGNMENT) * ALIGNMENT
    return aligned * world // itemsize


def parse_bytes(text: str) -> int:
    """Parses `64`, `8K`, `32M` or `1G`; units are powers of 1024."""
    unit = "KMG".find(text[-1:].upper()) + 1
    digits = text[:-1] if unit else text
    if not digits.isdigit() or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes such as 64, 8K, 32M or 1G")
    return int(digits) << 10 * unit


def sizes(smallest: int, largest: int, factor: int) -> list[int]:
    """Returns smallest, smallest * factor, ... up to largest. Raises ConfigError for an empty
    range."""
    if smallest > largest or factor < 2:
        raise ConfigError(
            f"--min-bytes {smallest} --max-bytes {largest} --factor {factor}: no such range; the "
            "smallest must not exceed the largest, and the factor must be at least 2"
        )
    series = [smallest]
    while series[-1] * factor <= largest:
        series.append(series[-1] * factor)
    return series


def measure(
    names: Sequence[str],
    size_list: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    backend: Backend,
    me: comm.Member,
) -> list[dict[str, Any]]:
    """Returns a row for each operation and size, the same on every rank."""
    cases = {
        (name, count): comm.operation(name, count, dtype, me)
        for name in names
        for count in dict.fromkeys(elements(s, dtype.itemsize, me.world) for s in size_list)
    }
    contestants: dict[str, Callable[[], Any]] = {}
    for key, case in cases.items():
        contestants[f"all arrived {key}"] = comm.barrier
        contestants[str(key)] = _finished(case.run, backend)
    quiet = contextlib.redirect_stderr(io.StringIO() if me.rank else sys.stderr)
    with quiet:
        timings = interleave(contestants, rounds)
    rows = []
    for (name, count), case in cases.items():
        seconds = comm.slowest_times(list(timings[str((name, count))].seconds), me)
        case.refill()
        case.run()
        wrong = int(sum(comm.gathered_values(case.wrong(), me)))
        rows.append(row(name, count, dtype, me.world, Timing(seconds=tuple(seconds)), wrong))
    return rows


def _finished(run: Callable[[], None], backend: Backend) -> Callable[[], None]:
    def timed() -> None:
        run()
        if backend.device_type != "cpu":
            backend.synchronize()

    return timed


def row(
    name: str, count: int, dtype: torch.dtype, world: int, timing: Timing, wrong: int
) -> dict[str, Any]:
    """Returns one row. For all-gather, reduce-scatter and all-to-all its count is a rank's share,
    as in nccl-tests."""
    size, seconds = count * dtype.itemsize, timing.median_s
    algbw = size / seconds / 1e9
    return {
        "op": name,
        "size_bytes": size,
        "count": count if name in ("all_reduce", "p2p") else count // world,
        "type": TYPES[str(dtype).removeprefix("torch.")],
        "redop": "sum" if name in comm.REDUCING else "none",
        "seconds": list(timing.seconds),
        "time_us": seconds * 1e6,
        "time_spread": timing.spread,
        "algbw_gb_s": algbw,
        "busbw_gb_s": algbw * bus_factor(name, world),
        "wrong": wrong,
    }


def line(r: dict[str, Any]) -> str:
    """Formats a row in nccl-tests' columns."""
    time_us = f"{r['time_us']:8.2f}" if r["time_us"] < 1e5 else f"{r['time_us']:8.0f}"
    return (
        f"{r['size_bytes']:12}  {r['count']:12}  {r['type']:>8}  {r['redop']:>6}  {-1:6} "
        f"{time_us}  {r['algbw_gb_s']:6.2f}  {r['busbw_gb_s']:6.2f}  {r['wrong']:6}"
    )


def text(result: dict[str, Any]) -> str:
    """Formats a table for each operation."""
    lines = [f"# {result['ranks']} ranks over {result['library']}, backend {result['backend']}"]
    for name in dict.fromkeys(r["op"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["op"] == name]
        mean = sum(r["busbw_gb_s"] for r in rows) / len(rows)
        lines += [f"#\n# {name}", HEAD, *map(line, rows), f"# Avg bus bandwidth    : {mean:.6g}"]
    return "\n".join([*lines, f"# {result['machine']}"])


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m glm_core.bench.comm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument(
        "--backend", default="reference", help="backend whose device and library are used"
    )
    parser.add_argument("--dtype", default="float32", choices=sorted(TYPES))
    parser.add_argument("--min-bytes", type=parse_bytes, default="1K", metavar="SIZE")
    parser.add_argument("--max-bytes", type=parse_bytes, default="16M", metavar="SIZE")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="without torchrun (default 2)"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables. Exits 1 where a result was wrong."""
    args = options().parse_args(argv)
    try:
        if "RANK" not in os.environ:
            words = list(sys.argv[1:] if argv is None else argv)
            launch.run_locally(args.processes, ["-m", "glm_core.bench.comm", *words])
            return 0
        return _member(args)
    except GlmCoreError as error:
        print(f"glm_core.bench.comm: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2


def _member(args: argparse.Namespace) -> int:
    size_list = sizes(args.min_bytes, args.max_bytes, args.factor)
    backend, dtype = registry.usable(args.backend), getattr(torch, args.dtype)
    with comm.process_group(backend) as me:
        rows = measure(args.op, size_list, dtype, args.rounds, backend, me)
    result = {
        "rows": rows,
        "ranks": me.world,
        "library": me.library,
        "backend": backend.name,
        "machine": machine(),
    }
    if me.rank == 0:
        print(json.dumps(result) if args.json else text(result), flush=True)
    return int(any(r["wrong"] for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
