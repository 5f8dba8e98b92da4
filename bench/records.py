"""Measures records of captured calls: `python -m glm_core.bench.records FOLDER --record` on one
machine or instruction set, without `--record` on the other. Every record is compared, and each
planted fault of an operator in it is tried here. Prints a line of JSON for each record."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from glm_core.align.verdict import FALSE_ALARM_RATE
from glm_core.bench.verdict import MODELS, batch_of, model_of
from glm_core.faults.aten import ATEN_FAULTS, AtenFault, Planted
from glm_core.measure.timing import machine
from glm_core.verdict import watch
from glm_core.verdict.against import again, compare
from glm_core.verdict.record import Record, Recorder, read

NAMES = "gpt2,llama,mixtral,bert,resnet,convnext,mamba,t5"


def record(name: str, dtype: torch.dtype, path: Path) -> dict[str, Any]:
    """Records the second of two steps of a tiny model. Returns the figures."""
    torch.manual_seed(1)
    model, batch = model_of(name).to(dtype), batch_of(name, dtype)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = watch(model, adam, steps=(2,), program=name)
    recorder = watched.mode.recorder = Recorder()
    with watched:
        for _ in range(2):
            model(**batch).loss.backward()
            adam.step()
            adam.zero_grad()
    recorder.save(path, watched.report())
    return {"calls": len(recorder.rows), "mib": path.stat().st_size / 2**20}


def judge(there: Record, dtype: str) -> dict[str, Any]:
    """Compares a record honestly, then with each fault planted here. Returns the figures."""
    honest = compare(there, "cpu", FALSE_ALARM_RATE)
    tried = [
        (f.name, outcome)
        for f in ATEN_FAULTS
        if dtype in f.dtypes and (outcome := found(there, f)) is not None
    ]
    return {
        "calls": honest.calls,
        "equal": honest.equal,
        "wrong": honest.sides(),
        "not_compared": {u.operator: u.reason for u in honest.not_compared},
        "faults_met": len(tried),
        "faults_missed": [name for name, outcome in tried if not outcome],
    }


def found(there: Record, fault: AtenFault) -> bool | None:
    """Says whether a fault that is planted here is named; None where it changes no result."""
    own = [(n, c) for n, c in there.calls if n == fault.operator and c is not None]
    if not own:
        return None
    plain = [again(c, "cpu") for _, c in own]
    with Planted(fault):
        try:
            wrong = [again(c, "cpu") for _, c in own]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # the fault is written for other arguments
        pairs = zip(plain, wrong, strict=True)
        if all(torch.equal(y, w[n]) for p, w in pairs for n, y in p.items()):
            return None
        alone = dataclasses.replace(there, calls=[*own], left_out=[])
        rate = FALSE_ALARM_RATE * len(own) / len(there.calls)
        return fault.operator in compare(alone, "cpu", rate).sides()


def main() -> None:
    """Records or judges each model in each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true", help="make the records")
    parser.add_argument("--only", default=NAMES, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": machine()}, default=str), flush=True)
    for name in args.only.split(","):
        for dtype in args.dtypes.split(","):
            path, begin = args.folder / f"{name}.{dtype}.safetensors", time.process_time()
            figures = (
                record(name, getattr(torch, dtype), path)
                if args.record
                else judge(read(path), dtype)
            )
            seconds = time.process_time() - begin
            row = {"model": name, "dtype": dtype, **figures, "cpu_s": seconds}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
