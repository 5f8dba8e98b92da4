"""Decodes GLM-4.7-Flash's shapes in int4, beside reading memory, in turn: `python -m
glm_core.bench.flash FOLDER`.

The checkpoint in FOLDER is made there if it is absent, part by part, with random values and as many
of the 47 layers as requested; the first is dense, the others have 64 experts. A token reads 4 of
them. `read` is what the faster of two readers of a large buffer takes. A token of all 47 layers is
extrapolated: from that of these layers, for each that is missing a sparse layer's mean time, taken
from the second half of them. Give as many layers as keep half of a token's bytes out of the caches.

Nothing is extrapolated with `--layers 47`: 17 GB on disk and as much in memory.

`--peer llama` decodes the same shapes by llama.cpp in the same rounds, and needs the memory of both
(`pip install llama-cpp-python gguf`)."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm_core.backends import registry
from glm_core.bench import folders, llama
from glm_core.bench.decode import READ_BYTES, REST_S, readers
from glm_core.bench.peers import Engine
from glm_core.measure.memory import resident_peak_bytes
from glm_core.measure.timing import Timing, interleave, machine
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.quantize import quantize_head
from glm_core.model.runner import DecodeRow, Runner
from glm_core.pretrained.weights.reading import open_checkpoint

WHOLE = preset("glm-4.7-flash")
FASTEST_OF = 3
"""calls of each contender in a round; the fastest counts, which other processes disturb least"""
PROMPT = causal(range(64))


def read_bytes(part: torch.nn.Module) -> float:
    """Returns the bytes of a part's weights that one token reads."""
    share = WHOLE.experts_per_token / WHOLE.num_experts
    tensors = [*part.named_parameters(), *part.named_buffers()]
    return sum(t.nbytes * (share if ".experts_" in n else 1) for n, t in tensors)


def token_bytes(model: GLM, num_layers: int) -> float:
    """Returns the bytes that a token of a model with so many layers reads: sparse ones are alike,
    and the last layer is one."""
    assert model.head_codes is not None
    blocks = [read_bytes(b) for b in model.blocks]
    return read_bytes(model.head_codes) + sum(blocks) + (num_layers - len(blocks)) * blocks[-1]


def stepper(runner: Runner) -> Any:
    """Returns a call that decodes one token: it takes about as long as a read, so that other
    processes disturb both alike."""
    place = itertools.count(len(PROMPT.tokens))

    def step() -> None:
        n = next(place)
        runner.decode([DecodeRow(7 + n % 64, PROMPT, n)])

    runner.prefill(0, [PROMPT])
    return step


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the figures."""
    folder = Path(args.folder)
    if not folder.exists():
        config = preset("glm-4.7-flash", num_layers=args.layers, num_mtp_layers=0)
        folders.write(folder, config, bits=4, group=args.group, activation_bits=8)
    model = open_checkpoint(folder).load(torch.bfloat16, quantized=True).requires_grad_(False)
    quantize_head(model, 4)
    layers = len(model.blocks)
    with registry.use("cpu", strict=True):
        turns = {"all": stepper(Runner(model, 1, args.context))}
        half = copy.copy(model)
        half._modules = {**model._modules, "blocks": model.blocks[: layers // 2]}
        half.config = dataclasses.replace(model.config, num_layers=layers // 2)
        turns["half"] = stepper(Runner(half, 1, args.context))
        peer = None
        if args.peer:
            peer = llama.llama(model.config, len(PROMPT.tokens), False, args.context)
            turns["peer"] = peer.step
        rest_s = REST_S if peer else 0.0
        took = interleave({**turns, **readers()}, args.rounds * FASTEST_OF, rest_s=rest_s)
    found = {"machine": machine(), **figures(model, layers, took)}
    return found | (against(peer, took) if peer else {})


def against(peer: Engine, took: dict[str, Timing]) -> dict[str, Any]:
    """Returns the figures of another engine, whose token is that of the same layers."""
    token, seconds = fastest(took["all"]), fastest(took["peer"])
    return {
        "peer": peer.name,
        "peer_token_ms": float(np.median(seconds)) * 1e3,
        "peer_token_bytes": peer.num_bytes,
        "ours_is_faster": [float(x) for x in np.quantile(seconds / token, (0.25, 0.5, 0.75))],
    }


def fastest(timing: Timing) -> Any:
    """Returns the seconds of each round's fastest call."""
    return np.array(timing.seconds).reshape(-1, FASTEST_OF).min(1)


def figures(model: GLM, layers: int, took: dict[str, Timing]) -> dict[str, Any]:
    """Returns medians over the rounds. A share is that of a round, whose machine was the same."""
    missing = WHOLE.num_layers - layers
    token = fastest(took["all"])
    layer = (token - fastest(took["half"])) / (layers - layers // 2)
    whole = token + missing * layer
    gb_s = READ_BYTES / 1e9 / np.minimum(fastest(took["sum"]), fastest(took["product"]))
    here, there = (token_bytes(model, n) for n in (layers, WHOLE.num_layers))
    last = model.blocks[-1]
    tensors = (*model.parameters(), *model.buffers())
    held = sum(t.nbytes for t in tensors)
    held += missing * sum(t.nbytes for t in (*last.parameters(), *last.buffers()))
    medians = {
        "read_gb_s": gb_s,
        "token_ms": token * 1e3,
        "layer_ms": layer * 1e3,
        "share_of_read": here / token / 1e9 / gb_s,
        "layer_share_of_read": read_bytes(last) / layer / 1e9 / gb_s,
        "whole_token_ms_extrapolated": whole * 1e3,
        "whole_share_of_read_extrapolated": there / whole / 1e9 / gb_s,
    }
    return {
        "layers": layers,
        "token_bytes": here,
        "whole_token_bytes": there,
        "whole_weights_bytes_extrapolated": held,
        **{name: float(np.median(values)) for name, values in medians.items()},
        "spread": {name: t.spread for name, t in took.items()},
        "resident_peak_bytes": resident_peak_bytes(),
    }


def main() -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.flash", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--group", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--context", type=int, default=4096, metavar="N")
    parser.add_argument("--peer", choices=["llama"], help="another engine, in turn")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default %(default)s")
    args = parser.parse_args()
    if args.layers < 2:
        parser.error(f"--layers {args.layers}: the first is dense; give at least 2")
    print(json.dumps(run(args), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
