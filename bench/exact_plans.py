"""Times an exact step under a plan against a fast one, in turn, on this machine's own processes:
`python -m glm_core.bench.exact_plans dp=2 tp=2`. Times are CPU time, summed over the processes: on
shared cores the clock would show who waited for whom. A ratio above 1 is what `exact` costs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from glm_core.backends import registry
from glm_core.bench.utilisation import RandomText
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.distributed import comm, launch, mesh
from glm_core.distributed.exact import ExactProcesses
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.measure.timing import Timing, interleave, machine, ratio
from glm_core.model.presets import preset
from glm_core.training.trainer import Trainer

PROCESSES, BATCH, LENGTH = 2, 4, 256


def step(args: argparse.Namespace, label: str, exact: bool) -> Trainer:
    """Returns a trainer under the plan; every process calls it in the same order."""
    plan, model = parse(label), preset(args.preset)
    train = TrainConfig(
        dtype=args.dtype, exact=exact, micro_batch=BATCH // plan.dp, global_batch=BATCH
    )
    config = RunConfig(model=model, data=DataConfig(length=LENGTH, vocab=model.vocab), train=train)
    backend, kind = registry.get("cpu"), ExactProcesses if exact else ManyProcesses
    parallel = kind(config, plan, mesh.make(plan, "cpu"), backend)
    return Trainer(config, RandomText(model.vocab, LENGTH), parallel)


def member(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Does one process's part; returns a row for each plan, the same on all."""
    rows = []
    with comm.process_group(registry.usable("cpu"), 600.0) as me:
        for label in args.plans:
            trainers = {k: step(args, label, k == "exact") for k in ("fast", "exact")}

            def run(kind: str, trainers: dict[str, Trainer] = trainers) -> None:
                with registry.use("cpu", strict=True, exact=kind == "exact"):
                    trainers[kind].step()

            calls = {k: lambda kind=k: run(kind) for k in trainers}
            own = interleave(calls, args.rounds, warmup=1, clock=time.process_time)
            timing = {
                k: Timing(seconds=tuple(sum(comm.gathered_values(s, me)) for s in t.seconds))
                for k, t in own.items()
            }
            times = {f"{k}_ms": round(t.median_s * 1e3, 1) for k, t in timing.items()}
            rows.append({"plan": label, **times, **ratio(timing["exact"], timing["fast"])})
            if me.rank == 0:
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help=f"of {PROCESSES} processes")
    parser.add_argument("--preset", default="glm4-34m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launch.run_locally(PROCESSES, ["-m", "glm_core.bench.exact_plans", *sys.argv[1:]])
        return
    rows = member(args)
    if os.environ["RANK"] == "0":
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1), flush=True)


if __name__ == "__main__":
    main()
