"""Decodes one token after another against other engines, in turn: `python -m
glm_core.bench.decode`.

All engines have the same GLM-4-style shapes and random weights, one sequence and a short context.
Engines that are not installed are left out and named (`pip install transformers torchao
onnxruntime-genai llama-cpp-python gguf chatglm-cpp tabulate` brings all; chatglm-cpp is built under
CMAKE_POLICY_VERSION_MINIMUM=3.5). `ceiling_gb_s` is what the faster of two readers of a large
buffer reaches in the same rounds. A row's `gb_s` counts the weights of all products, head included,
once for each token."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from glm_core import ops
from glm_core.backends.registry import use
from glm_core.bench import chatglm, llama, matmul_nbits, peers
from glm_core.bench.peers import Engine
from glm_core.config import ModelConfig
from glm_core.measure.noise import NoiseWatch, irregularities
from glm_core.measure.rows import Row
from glm_core.measure.timing import Timing, interleave, machine, ratio
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.quantize import Quantization, convert, quantize_head
from glm_core.model.runner import DecodeRow, Runner

PROMPT = 64
TURN = 8
"""tokens that an engine decodes in its turn; the first finds the caches as another engine left
them"""
READ_BYTES = 512 << 20
"""size of the buffer whose reading is the ceiling"""
REST_S = 0.1
"""rest before every turn: ONNX Runtime's threads spin on after theirs and slow the next engine"""
PEERS = (
    "transformers",
    "torchao",
    "onnxruntime",
    "onnx",
    "onnxruntime_genai",
    "llama_cpp",
    "gguf",
    "chatglm_cpp",
)


class Ours(NamedTuple):
    """A precision of our model."""

    dtype: str
    how: Quantization | None = None
    head_bits: int = 0
    """bits of the head's weights; 0: it is not quantised"""


INT4 = Quantization(bits=4, group=128, activation_bits=8)
OURS = {
    "float32": Ours("float32"),
    "bfloat16": Ours("bfloat16"),
    "int8": Ours("bfloat16", Quantization(bits=8, activation_bits=8)),
    "int4": Ours("bfloat16", INT4),
    "int4 float activations": Ours("bfloat16", Quantization(bits=4, group=128)),
    # as in llama.cpp and ONNX Runtime GenAI
    "int4, head too": Ours("bfloat16", INT4, head_bits=4),
}


def shapes() -> ModelConfig:
    """Returns the shapes of 0.31B parameters: too large for any cache, small enough to hold seven
    times."""
    return preset(
        "glm-4-9b",
        num_layers=12,
        hidden=1536,
        num_heads=12,
        num_kv_heads=2,
        ffn=4096,
        vocab=8192,
        max_length=2048,
    )


def read_weights(model: GLM) -> int:
    """Returns the bytes of all products' weights."""
    inside = sum(t.nbytes for t in (*model.blocks.parameters(), *model.blocks.buffers()))
    codes = model.head_codes
    head = [model.head_weight] if codes is None else codes.buffers()
    return inside + sum(t.nbytes for t in head)


def ours(config: ModelConfig, dtype: str, prompt: int, prefill: bool) -> Engine:
    """Returns our model on the `cpu` backend, with its cache."""
    chosen = OURS[dtype]
    model = built(config, chosen.dtype, chosen.how)
    if chosen.head_bits:
        quantize_head(model, chosen.head_bits)
    text = causal([i % config.vocab for i in range(prompt)])
    runner, place = Runner(model, 1), itertools.count(prompt)

    def fill() -> None:
        with use("cpu", strict=True):
            runner.prefill(0, [text])

    def decode() -> None:
        with use("cpu", strict=True):
            runner.decode([DecodeRow(7, text, next(place))])

    fill()
    return Engine("ours", dtype, fill if prefill else decode, read_weights(model))


def built(config: ModelConfig, dtype: str, how: Quantization | None) -> GLM:
    """Returns a model with random weights, quantised where `how` says so."""
    model = randomly(GLM(config)).to(getattr(torch, dtype)).requires_grad_(False)
    for _ in convert(model, how) if how else ():
        pass
    return model


def randomly(model: GLM) -> GLM:
    """Fills the weights with values of a usual size; the time does not depend on them."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    return model


def engines(config: ModelConfig, prompt: int, prefill: bool, dtypes: list[str]) -> Iterator[Engine]:
    """Yields every engine that is installed."""
    for dtype in dtypes:
        yield ours(config, dtype, prompt, prefill)
    installed = {name for name in PEERS if importlib.util.find_spec(name)}
    if "transformers" in installed:
        for dtype in ("float32", "bfloat16"):
            yield peers.transformers_glm(config, dtype, prompt, prefill)
    if {"transformers", "torchao"} <= installed:
        for bits in (8, 4):
            yield peers.torchao_glm(config, bits, prompt, prefill)
    if {"onnxruntime", "onnx"} <= installed:
        step, size = matmul_nbits.chain(config, prompt if prefill else 1)
        yield Engine("onnxruntime MatMulNBits, products alone", "int4", step, size)
        model = built(config, "float32", INT4)
        yield peers.onnxruntime_glm(model, prompt, prefill, read_weights(model))
    if {"onnxruntime_genai", "transformers"} <= installed:
        yield peers.genai(config, prompt, prefill)
    if {"llama_cpp", "gguf"} <= installed:
        yield llama.llama(config, prompt, prefill)
    if {"chatglm_cpp", "transformers"} <= installed:
        yield chatglm.chatglm(config, prompt, prefill)


def readers() -> dict[str, Callable[[], Any]]:
    """Returns two ways to read READ_BYTES from memory: torch's sum, and our product with one row,
    which prefetches and is the faster one on some machines."""
    # ones, not zeros: pages that were never written are all read from one page
    buffer, width = torch.ones(READ_BYTES // 4), 4096
    weight = torch.ones(READ_BYTES // 2 // width, width, dtype=torch.bfloat16)
    row = torch.ones(1, width, dtype=torch.bfloat16)

    def product() -> None:
        with use("cpu", strict=True), torch.no_grad():
            ops.linear(row, weight)

    return {"sum": buffer.sum, "product": product}


def timed(
    config: ModelConfig, rounds: int, prefill: int, dtypes: list[str]
) -> tuple[list[Engine], dict[str, Timing]]:
    """Times every engine in turn. Returns the engines, and the seconds of a token or of the prompt
    by engine; `read` holds those of the faster reader."""
    contenders = list(engines(config, prefill or PROMPT, bool(prefill), dtypes))
    times, reading = 1 if prefill else TURN, readers()

    def turn(step: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [step() for _ in range(times)]

    contestants = {f"{e.name}, {e.dtype}": turn(e.step) for e in contenders}
    taken = interleave({**contestants, **reading}, rounds, rest_s=REST_S)
    each = {n: Timing(seconds=tuple(s / times for s in taken[n].seconds)) for n in contestants}
    return contenders, {**each, "read": min((taken[n] for n in reading), key=lambda t: t.median_s)}


def rows(rounds: int, prefill: int, dtypes: list[str], machine_facts: dict[str, Any]) -> list[Row]:
    """Returns a row for each engine; its peer is the read of the same rounds."""
    watch = NoiseWatch()
    contenders, timing = timed(shapes(), rounds, prefill, dtypes)
    read, notes, tokens = timing["read"], tuple(watch.notes()), prefill or 1
    source = f"measured here, best of {rounds}: read of {READ_BYTES >> 20} MiB"
    peak = {"tflops": 0.0, "gb_s": READ_BYTES / min(read.seconds) / 1e9, "source": source}
    kind = f"prefill {prefill}" if prefill else "decode"
    return [
        Row(
            bench="decode",
            key=f"{kind} {e.name}, {e.dtype}",
            backend="cpu",
            dtype=e.dtype,
            shape=f"1x{prefill or PROMPT}",
            seconds=timing[f"{e.name}, {e.dtype}"].seconds,
            peer="read",
            peer_seconds=read.seconds,
            bytes=e.num_bytes,
            peak=peak,
            machine=machine_facts,
            figures={"tokens_s": tokens / timing[f"{e.name}, {e.dtype}"].median_s},
            notes=(*notes, *irregularities(timing[f"{e.name}, {e.dtype}"].seconds)),
        )
        for e in contenders
    ]


def measure(rounds: int, prefill: int, dtypes: list[str]) -> dict[str, Any]:
    """Returns rows with their ratios to ours in int4 (above 1: ours is faster), the read ceiling
    and the machine."""
    prompt = prefill or PROMPT
    contenders, timing = timed(shapes(), rounds, prefill, dtypes)
    ceiling = READ_BYTES / timing["read"].median_s / 1e9
    base = timing.get("ours, int4")
    rows = [
        _row(e, timing[f"{e.name}, {e.dtype}"], base, prefill or 1, ceiling) for e in contenders
    ]
    missing = [p for p in PEERS if not importlib.util.find_spec(p)]
    return {
        "rows": rows,
        "ceiling_gb_s": ceiling,
        "prompt": prompt,
        "prefill": bool(prefill),
        "not_installed": missing,
        "machine": machine(),
    }


def _row(e: Engine, t: Timing, base: Timing | None, tokens: int, ceiling: float) -> dict[str, Any]:
    gb_s = e.num_bytes / t.median_s / 1e9
    row = {
        "engine": e.name,
        "dtype": e.dtype,
        "tokens_s": tokens / t.median_s,
        "gb_s": gb_s,
        "bandwidth_share": gb_s / ceiling,
        "spread": t.spread,
    }
    return row | ({"ours_int4_is_faster": ratio(t, base)["ratio"]} if base else {})


def main() -> int:
    """Prints a row for each engine."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="read N tokens instead")
    parser.add_argument("--dtype", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.rounds, args.prefill, args.dtype)
    if args.json:
        print(json.dumps(result))
        return 0
    for r in result["rows"]:
        against = f"{r['ours_int4_is_faster']:6.2f}x" if "ours_int4_is_faster" in r else ""
        print(
            f"{r['engine']:40} {r['dtype']:24} {r['tokens_s']:9.2f} tokens/s {r['gb_s']:6.2f} GB/s "
            f"{r['bandwidth_share']:5.0%} {against}"
        )
    print(
        f"read ceiling {result['ceiling_gb_s']:.1f} GB/s; not installed: "
        f"{', '.join(result['not_installed']) or 'none'}"
    )
    print(result["machine"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
