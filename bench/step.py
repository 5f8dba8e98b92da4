"""Times a whole training step against transformers, in turn: `python -m glm_core.bench.step --peer
transformers`.

Both sides have the same model, batch and optimizer: preset glm4-34m, or with experts tiny-moe,
without its layer of multi-token prediction. In bfloat16 ours keeps bfloat16 weights and float32
masters; the peer runs autocast over float32 weights, as its users do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.backends.registry import get, use
from glm_core.bench import peers as other
from glm_core.config import ModelConfig, TrainConfig
from glm_core.dispatch import Op, intercept, run
from glm_core.errors import ConfigError
from glm_core.measure.noise import NoiseWatch, irregularities
from glm_core.measure.rows import Row
from glm_core.measure.timing import Timing, gemm, gemm_flops, interleave, machine, ratio
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.spec import Support
from glm_core.training.graph import RecordedLoss
from glm_core.training.optimizer import Optimizer

BATCH, LENGTH = 4, 256
SIZES = (BATCH, LENGTH)
DTYPES = ("float32", "bfloat16")
MODELS = ("glm4-34m", "tiny-moe")


def inputs(vocab: int, sizes: tuple[int, int] = SIZES) -> tuple[Tensor, Tensor]:
    """Returns tokens [B, L + 1] from a fixed seed and positions [L]."""
    batch, length = sizes
    tokens = torch.randint(
        0, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(0)
    )
    return tokens, torch.arange(length)


def ours(
    config: ModelConfig,
    dtype: str,
    backend: str = "cpu",
    graph: bool = False,
    sizes: tuple[int, int] = SIZES,
) -> Callable[[], float]:
    """Returns one step of ours: forward, backward, clip, AdamW. graph: forward and backward are
    recorded and replayed (`train.graph`). Raises ConfigError where the backend records nothing."""
    device = get(backend).device()
    tokens, position = (x.to(device) for x in inputs(config.vocab, sizes))
    model = GLM(config).init_weights(0).to(device, getattr(torch, dtype))
    optimizer = Optimizer(model, TrainConfig(dtype=dtype))  # type: ignore[arg-type]  # checked by TrainConfig
    rows = position.expand(sizes)
    where = (
        torch.stack((rows, torch.zeros_like(rows)), 1),
        torch.zeros_like(rows, dtype=torch.int32),
    )
    weight = torch.full(sizes, 1 / rows.numel(), device=device)
    batch = (tokens[:, :-1], *where, (rows + 1).int(), tokens[:, 1:], weight)
    recorded = None
    if graph:
        graphs = get(backend).graphs(device)
        if isinstance(graphs, Support):
            raise ConfigError(graphs.reason)
        recorded = RecordedLoss(model, model.loss, graphs)

    def step() -> float:
        with use(backend, strict=backend == "cpu"):
            model.zero_grad(set_to_none=True)
            if recorded is None:
                loss = model.loss(*batch)
                loss.backward()
            else:
                loss = recorded(batch)
            optimizer.step(1e-3)
            return float(loss.detach())

    return step


def transformers_glm(
    config: ModelConfig,
    dtype: str,
    compiled: bool,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # a constant
    sizes: tuple[int, int] = SIZES,
) -> Callable[[], float]:
    """Returns one step of transformers' model with fused torch AdamW."""
    tokens = inputs(config.vocab, sizes)[0].to(device)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model = other.glm(config, use_cache=False).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True
    )

    def forward(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            # shift_labels: one label for each position, as ours
            loss: Tensor = model(input_ids=ids, labels=labels, shift_labels=labels).loss
            return loss

    run_forward = torch.compile(forward) if compiled else forward

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = run_forward(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def matmul_flops(config: ModelConfig, sizes: tuple[int, int] = SIZES) -> int:
    """Returns the forward and backward FLOPs of the step's matrix products, from the ops' cost
    functions."""
    total = 0

    def count(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal total
        if op.name in ("linear", "grouped_linear", "linear_cross_entropy"):
            cost = op.cost(*args, **kwargs)
            total += cost.flops + cost.backward_flops
        return run(op, args, kwargs)

    with torch.device("meta"), use("null"), intercept(count):
        rows = torch.zeros(sizes, dtype=torch.int64)
        mask = rows.int()
        GLM(config).loss(rows, torch.stack((rows, rows), 1), mask, mask, rows, rows.float())
    return total


def measure(
    dtype: str,
    rounds: int,
    peers: tuple[str, ...],
    backend: str = "cpu",
    model: str = MODELS[0],
) -> dict[str, Any]:
    """Measures one dtype: medians in ms, ratios with quartiles, share of the GEMM ceiling of the
    same rounds."""
    config = dataclasses.replace(preset(model), num_mtp_layers=0)
    timing, losses = timed(config, dtype, rounds, peers, backend)
    ceiling = gemm_flops() / timing["gemm"].median_s
    reached = matmul_flops(config) / timing["ours"].median_s
    row = {
        "tokens_s": BATCH * LENGTH / timing["ours"].median_s,
        "gemm_ceiling_gflop_s": ceiling / 1e9,
        "gemm_share": reached / ceiling,
        "first_loss": losses,
        **{f"{n}_ms": t.median_s * 1e3 for n, t in timing.items()},
        **{f"{n}_spread": t.spread for n, t in timing.items()},
    }
    return row | {k: v for p in peers for k, v in compared(p, timing).items()}


def timed(
    config: ModelConfig, dtype: str, rounds: int, peers: tuple[str, ...], backend: str
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times ours, the peers and a matrix product in turn. Returns the times and the first loss of
    each."""
    contestants: dict[str, Callable[[], Any]] = {"ours": ours(config, dtype, backend)}
    for peer in peers:
        contestants[peer] = transformers_glm(config, dtype, peer == "compiled")
    contestants["gemm"] = gemm(getattr(torch, dtype))
    losses = {name: run() for name, run in contestants.items() if name != "gemm"}
    return interleave(contestants, rounds), losses


def rows(
    dtype: str, rounds: int, peers: tuple[str, ...], backend: str, machine_facts: dict[str, Any]
) -> list[Row]:
    """Returns a row for each peer, all of the same rounds."""
    config = preset("glm4-34m")
    watch = NoiseWatch()
    timing, losses = timed(config, dtype, rounds, peers, backend)
    own, notes = timing["ours"].seconds, tuple(watch.notes())
    return [
        Row(
            bench="step",
            key=f"step {backend} {dtype} glm4-34m against transformers {peer}",
            backend=backend,
            dtype=dtype,
            shape=f"{BATCH}x{LENGTH}",
            seconds=own,
            peer=f"transformers {peer}",
            peer_seconds=timing[peer].seconds,
            machine=machine_facts,
            flops=matmul_flops(config),
            notes=(*notes, *irregularities(own)),
            figures={
                "tokens_s": BATCH * LENGTH / timing["ours"].median_s,
                "first_loss": losses,
                **compared(peer, timing),
            },
        )
        for peer in peers
    ]


def compared(peer: str, timing: dict[str, Timing]) -> dict[str, float]:
    """Returns ratio_PEER with its quartiles; above 1, ours is faster."""
    r = ratio(timing[peer], timing["ours"])
    return {
        f"ratio_{peer}": r["ratio"],
        f"ratio_{peer}_low": r["low"],
        f"ratio_{peer}_high": r["high"],
    }


def main() -> int:
    """Prints a row for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.step", description=__doc__)
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--eager-only", action="store_true", help="leave out the compiled peer")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--preset", default=MODELS[0], choices=MODELS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = ("eager",) if args.eager_only else ("eager", "compiled")
    peers = names if args.peer == "transformers" else ()
    result: dict[str, Any] = {
        d: measure(d, args.rounds, peers, args.backend, args.preset) for d in args.dtype
    }
    result["machine"] = machine()
    if args.json:
        print(json.dumps(result))
        return 0
    for dtype in args.dtype:
        print(dtype)
        for key, value in result[dtype].items():
            print(f"  {key:24} {value:.3f}" if isinstance(value, float) else f"  {key:24} {value}")
    print(result["machine"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
