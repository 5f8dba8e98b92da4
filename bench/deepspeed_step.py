"""Measures what a step costs under the DeepSpeed facade and under DeepSpeed itself: the same script
on two processes each, in turn. `python -m glm_core.bench.deepspeed_step --real PYTHON`."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import IO, Any

import torch
from torch import Tensor, nn

from glm_core.measure.timing import Timing, interleave, ratio

SIZES = {"tiny": (32, 8, 4), "medium": (512, 8, 64)}
"""width, layers, rows of a micro-batch; tiny is nearly all overhead"""
RANKS = 2


class Layers(nn.Module):
    """Residual layers with norms;  [B, D] -> loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean square of the last layer's output."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def worker(peer: str, stage: int, size: str) -> None:
    """Runs one rank. For each number on stdin it does so many steps, then writes its loss and the
    CPU seconds they took to stdout."""
    if peer == "deepspeed":
        import deepspeed

        # a shared-memory all-reduce that would be compiled for minutes; gloo is what is compared
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        import glm_core.deepspeed as deepspeed
    deepspeed.init_distributed("gloo")
    width, layers, rows = SIZES[size]
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    torch.manual_seed(0)
    model = Layers(width, layers)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    x = torch.randn(rows, width)
    print("READY", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            loss = engine(x)
            engine.backward(loss)
            engine.step()
        print(f"READY {loss.item():.6f} {time.process_time() - start:.6f}", flush=True)
    os._exit(0)  # DeepSpeed's exit handlers take seconds


class Pair:
    """The waiting processes of one peer."""

    def __init__(self, python: str, peer: str, stage: int, size: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        shared = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        words = [python, "-m", "glm_core.bench.deepspeed_step", "--worker", peer, str(stage), size]
        self.processes = [
            subprocess.Popen(
                words,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for r in range(RANKS)
        ]
        self.loss = ""
        self.cpu_seconds: list[float] = []
        """of each call, the ranks' mean"""
        self._wait()

    def _wait(self) -> None:
        seconds = []
        for p in self.processes:
            out: IO[str] | None = p.stdout
            assert out is not None
            for line in out:
                if line.startswith("READY"):
                    if result := line.split()[1:]:
                        self.loss = result[0]
                        seconds.append(float(result[1]))
                    break
            else:
                raise RuntimeError(f"{p.args!r}: ended; run it by hand to see why")
        if seconds:
            self.cpu_seconds.append(statistics.mean(seconds))

    def __call__(self, steps: int) -> None:
        """Does so many steps on all ranks."""
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.write(f"{steps}\n")
            p.stdin.flush()
        self._wait()

    def close(self) -> None:
        """Ends the processes."""
        for p in self.processes:
            p.kill()
            p.communicate()


def measure(real: str, stage: int, size: str, steps: int, rounds: int) -> dict[str, Any]:
    """Returns the milliseconds per step of both peers and how many times longer DeepSpeed's are.
    They are measured by the clock, and in CPU time of a rank, which the machine's other processes
    hardly change."""
    with ExitStack() as stack:
        pairs = {}
        for peer, python in (("ours", sys.executable), ("deepspeed", real)):
            pairs[peer] = Pair(python, peer, stage, size)
            stack.callback(pairs[peer].close)
        runs = {peer: (lambda p=pair: p(steps)) for peer, pair in pairs.items()}
        times = interleave(runs, rounds)
        losses = {peer: pair.loss for peer, pair in pairs.items()}
        cpu = {p: Timing(seconds=tuple(pair.cpu_seconds[-rounds:])) for p, pair in pairs.items()}
    ms = {peer: t.median_s / steps * 1e3 for peer, t in times.items()}
    return {
        "size": size,
        "stage": stage,
        "ours_ms": round(ms["ours"], 3),
        "deepspeed_ms": round(ms["deepspeed"], 3),
        "steps": steps,
        "rounds": rounds,
        "deepspeed_over_ours": ratio(times["deepspeed"], times["ours"]),
        "ours_cpu_ms": round(cpu["ours"].median_s / steps * 1e3, 3),
        "deepspeed_cpu_ms": round(cpu["deepspeed"].median_s / steps * 1e3, 3),
        "cpu_deepspeed_over_ours": ratio(cpu["deepspeed"], cpu["ours"]),
        "losses": losses,
    }


def main() -> None:
    """Prints one JSON line per size and stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", help="Python with DeepSpeed (tests/deepspeed/setup_deepspeed.sh)")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", nargs=3, metavar=("PEER", "STAGE", "SIZE"))
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), args.worker[2])
        return
    if not args.real:
        parser.error("--real: give the interpreter that has DeepSpeed")
    for size in args.sizes:
        for stage in args.stages:
            began = time.time()
            row = measure(args.real, stage, size, args.steps, args.rounds)
            print(json.dumps({**row, "took_s": round(time.time() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
