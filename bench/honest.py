"""Counts false alarms of the verdict on programs: `python -m glm_core.bench.honest --out FILE
[--seed N]`. Twenty tiny models of transformers are trained in every honest way that we know; none
may be called wrong. A run that FILE has already is not made again, so that the campaign can be cut
off and started anew."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from glm_core.bench.verdict import MODELS, VARIANTS, rows_of, train
from glm_core.measure.timing import machine
from glm_core.sensitivity.honest import interval

ISAS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
"""by kind: what makes torch and its libraries use older instructions; read when they are loaded"""
IMAGES = ("convnext", "resnet")
FORMULA = ("gpt2", "bert", "distilbert", "bloom", "mamba", "t5", *IMAGES)
"""models that call no fused attention: their attention drops out, or they have their own"""
Key = tuple[str, str, str, int]


def wanted(isa: str, seed: int) -> list[Key]:
    """Returns model, dtype, kind and seed of each run in a random order, so that a campaign that
    was cut off is a fair sample of all."""
    runs = list(_runs(isa, seed))
    random.Random(seed).shuffle(runs)
    return runs


def _runs(isa: str, seed: int) -> Iterator[Key]:
    for name in MODELS:
        for dtype in ("float32", "bfloat16"):
            for kind in [isa] if isa else VARIANTS:
                if kind == "channels_last" and name not in IMAGES:
                    continue
                if kind == "math" and name in FORMULA:
                    continue
                yield name, dtype, kind, seed


def key(row: dict[str, Any]) -> Key:
    """Returns what identifies a run."""
    return row["model"], row["dtype"], row["variant"], row["seed"]


def measure(path: Path, isa: str, seed: int) -> None:
    """Makes the runs that are missing, in this process."""
    done = {key(row) for row in rows_of(path)}
    with path.open("a", encoding="utf-8") as file:
        for name, dtype, kind, number in wanted(isa, seed):
            if (name, dtype, kind, number) in done:
                continue
            variant = "plain" if isa else kind
            row = train(name, getattr(torch, dtype), variant, trial=False, seed=number)
            print(json.dumps(row | {"variant": kind, "seed": number}), file=file, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Renders alarms and runs by kind, and every alarm."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["variant"]].append(row)
    lines = [f"| {'kind':14} | runs | alarms | calls judged | largest share of what is allowed |"]
    lines.append("|---|---|---|---|---|")
    for kind, own in {**kinds, "all": rows}.items():
        alarms, calls = sum(bool(r["guilty"]) for r in own), sum(r["calls"] for r in own)
        worst = max(r["worst_ratio"] for r in own)
        lines.append(f"| {kind:14} | {len(own)} | {alarms} | {calls} | {worst:.3g} |")
    alarms = sum(bool(r["guilty"]) for r in rows)
    bound = 100 * interval(alarms, len(rows), 0.9)[1]  # one side of it: 95 %
    lines.append(f"at 95 % confidence, at most {bound:.2g} % of honest runs are called wrong")
    lines += [f"ALARM {key(r)}: {'; '.join(r['guilty'])}" for r in rows if r["guilty"]]
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing of the campaign and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="file of the runs, one a line")
    parser.add_argument("--seed", type=int, default=2, help="of weights and batches")
    parser.add_argument("--isa", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.isa:
        return measure(args.out, args.isa, args.seed)
    with args.out.open("a", encoding="utf-8") as file:
        print(json.dumps({"machine": machine()}, default=str), file=file)
    for isa, variables in ISAS.items():
        words = [sys.executable, "-m", "glm_core.bench.honest", "--isa", isa]
        words += ["--out", str(args.out), "--seed", str(args.seed)]
        subprocess.run(words, env=os.environ | variables, check=True)
    measure(args.out, "", args.seed)
    print(table(rows_of(args.out)))


if __name__ == "__main__":
    main()
