"""Decodes with layers that are read from disk at every step, beside reading alone and computing
alone, in turn: `python -m glm_core.bench.offload FOLDER`.

The checkpoint in FOLDER is made there if it is absent, part by part: GLM-4-9B's layers, as many as
requested, with a small vocabulary and random values that repeat. `read` fetches the streamed layers
and computes nothing; `compute` takes a step with what the buffers happen to hold. If reading hides
computing, `step` takes as long as the longer of both. The system's cached pages of the file are
dropped before every turn, so that the disk is read, unless --cached."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.bench.folders import write
from glm_core.measure.memory import resident_peak_bytes
from glm_core.measure.timing import interleave, machine, ratio
from glm_core.model.fit import BUFFERS
from glm_core.model.offload import StreamedBlock, duplicate, streamed_layers
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.runner import DecodeRow, Runner
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.sizes import sizes
from glm_core.pretrained.weights.streaming import LayerFiles, load_streamed

CPU = torch.device("cpu")
BF16 = torch.bfloat16
PROMPT = causal(list(range(1, 9)))
CONTEXT = 256


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the figures."""
    folder = Path(args.folder)
    if not folder.exists():
        sizes_changed = {"num_layers": args.layers, "vocab": 32768, "max_length": 8192}
        write(folder, preset("glm-4-9b", **sizes_changed), args.bits)
    weights = open_checkpoint(folder)
    size = sizes(weights, BF16)
    layers = streamed_layers(size.num_layers, args.resident)
    files = LayerFiles(weights)
    disk_gb_s = files.gb_s(layers, BF16, cached=args.cached)
    model = load_streamed(files, BF16, CPU, layers, BUFFERS)
    runner, place = Runner(model, 1, CONTEXT), len(PROMPT.tokens)
    [stream] = {b._stream for b in model.blocks if isinstance(b, StreamedBlock)}
    fetch, buffer = stream._fetch, duplicate(stream._ahead[0].buffer, CPU)

    def drop() -> None:
        if not args.cached:
            with (folder / "model.safetensors").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read() -> None:
        drop()
        for layer in layers:
            fetch(layer, buffer)

    def decode() -> None:
        runner.decode([DecodeRow(7, PROMPT, place)])
        wait([ahead.done for ahead in stream._ahead])  # the next step's first layers

    def step() -> None:
        drop()
        stream._fetch = fetch
        decode()

    def compute() -> None:
        stream._fetch = lambda layer, block: None
        decode()

    with registry.use("cpu"):
        runner.prefill(0, [PROMPT])
        took = interleave({"read": read, "compute": compute, "step": step}, args.rounds, warmup=1)
    fetched = files.num_bytes(layers)
    return {
        "machine": machine(),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "resident_layers": args.resident,
        "streamed_layers": len(layers),
        "bytes_a_token": fetched,
        "disk_gb_s": disk_gb_s,
        "predicted_tokens_s": disk_gb_s * 1e9 / fetched,
        **{f"{name}_s": t.median_s for name, t in took.items()},
        **{f"{name}_spread": t.spread for name, t in took.items()},
        "tokens_s": 1 / took["step"].median_s,
        "step_over_read": ratio(took["step"], took["read"]),
        "least_bytes": size.least(True) + args.resident * size.layer,
        "resident_peak_bytes": resident_peak_bytes(),
    }


def main() -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.offload", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=14, metavar="N", help="default %(default)s")
    parser.add_argument("--bits", type=int, default=0, choices=(0, 4, 8), help="0: bfloat16")
    parser.add_argument("--resident", type=int, default=0, metavar="N", help="layers that stay")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--cached", action="store_true", help="leave the system's page cache alone")
    print(json.dumps(run(parser.parse_args()), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
