"""One token after another against other engines, interleaved: `python -m glm_core.bench.decode`.

The same GLM-4-style shapes and random weights everywhere, one sequence, a short context. Engines
that are not installed are left out and named (`pip install transformers torchao onnxruntime-genai
llama-cpp-python gguf chatglm-cpp tabulate` brings all; chatglm-cpp is built under
CMAKE_POLICY_VERSION_MINIMUM=3.5). `ceiling_gb_s` is what the faster of two readers of a large
buffer reaches in the same rounds; a row's `gb_s` counts the weights of all products, head included,
once a token."""

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
"""tokens an engine decodes in its turn: the first meets the caches as another engine left them"""
READ_BYTES = 512 << 20
REST_S = 0.1
"""before every turn: ONNX Runtime's threads spin on after theirs, at the cost of whoever is next"""
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
    """How our model computes."""

    dtype: str
    how: Quantization | None = None
    head_bits: int = 0
    """0: the head is left as it is"""


INT4 = Quantization(bits=4, group=128, activation_bits=8)
OURS = {
    "float32": Ours("float32"),
    "bfloat16": Ours("bfloat16"),
    "int8": Ours("bfloat16", Quantization(bits=8, activation_bits=8)),
    "int4": Ours("bfloat16", INT4),
    "int4 float activations": Ours("bfloat16", Quantization(bits=4, group=128)),
    # as llama.cpp and ONNX Runtime GenAI have it
    "int4, head too": Ours("bfloat16", INT4, head_bits=4),
}


def shapes() -> ModelConfig:
    """0.31B parameters: large enough not to fit any cache, small enough to hold seven times."""
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
    """Bytes of all products' weights."""
    inside = sum(t.nbytes for t in (*model.blocks.parameters(), *model.blocks.buffers()))
    codes = model.head_codes
    head = [model.head_weight] if codes is None else codes.buffers()
    return inside + sum(t.nbytes for t in head)


def ours(config: ModelConfig, dtype: str, prompt: int, prefill: bool) -> Engine:
    """Our model through its cache and the `cpu` backend."""
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
    """Random weights, quantised if asked."""
    model = randomly(GLM(config)).to(getattr(torch, dtype)).requires_grad_(False)
    for _ in convert(model, how) if how else ():
        pass
    return model


def randomly(model: GLM) -> GLM:
    """Values of the right size; which ones does not matter to the time."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    return model


def engines(config: ModelConfig, prompt: int, prefill: bool, dtypes: list[str]) -> Iterator[Engine]:
    """Everything that runs here."""
    for dtype in dtypes:
        yield ours(config, dtype, prompt, prefill)
    here = {name for name in PEERS if importlib.util.find_spec(name)}
    if "transformers" in here:
        for dtype in ("float32", "bfloat16"):
            yield peers.transformers_glm(config, dtype, prompt, prefill)
    if {"transformers", "torchao"} <= here:
        for bits in (8, 4):
            yield peers.torchao_glm(config, bits, prompt, prefill)
    if {"onnxruntime", "onnx"} <= here:
        step, size = matmul_nbits.chain(config, prompt if prefill else 1)
        yield Engine("onnxruntime MatMulNBits, products alone", "int4", step, size)
        model = built(config, "float32", INT4)
        yield peers.onnxruntime_glm(model, prompt, prefill, read_weights(model))
    if {"onnxruntime_genai", "transformers"} <= here:
        yield peers.genai(config, prompt, prefill)
    if {"llama_cpp", "gguf"} <= here:
        yield llama.llama(config, prompt, prefill)
    if {"chatglm_cpp", "transformers"} <= here:
        yield chatglm.chatglm(config, prompt, prefill)


def readers() -> dict[str, Callable[[], Any]]:
    """Two ways to read READ_BYTES from memory: torch's sum, and our product with one row, which
    asks for what it needs next and is the faster of the two on some machines."""
    # ones, not zeros: pages never written read as one zero page
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
    """Every engine in turn, seconds of a token or of the prompt; `read`: the faster reader."""
    found = list(engines(config, prefill or PROMPT, bool(prefill), dtypes))
    times, reading = 1 if prefill else TURN, readers()

    def turn(step: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [step() for _ in range(times)]

    contestants = {f"{e.name}, {e.dtype}": turn(e.step) for e in found}
    taken = interleave({**contestants, **reading}, rounds, rest_s=REST_S)
    each = {n: Timing(seconds=tuple(s / times for s in taken[n].seconds)) for n in contestants}
    return found, {**each, "read": min((taken[n] for n in reading), key=lambda t: t.median_s)}


def rows(rounds: int, prefill: int, dtypes: list[str], told: dict[str, Any]) -> list[Row]:
    """A row for each engine; the peer is the read of the same rounds. `told` is the machine."""
    watch = NoiseWatch()
    found, timing = timed(shapes(), rounds, prefill, dtypes)
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
            machine=told,
            figures={"tokens_s": tokens / timing[f"{e.name}, {e.dtype}"].median_s},
            notes=(*notes, *irregularities(timing[f"{e.name}, {e.dtype}"].seconds)),
        )
        for e in found
    ]


def measure(rounds: int, prefill: int, dtypes: list[str]) -> dict[str, Any]:
    """Rows with their ratios to ours in int4 (above 1: ours is faster), the read ceiling, the
    machine."""
    prompt = prefill or PROMPT
    found, timing = timed(shapes(), rounds, prefill, dtypes)
    ceiling = READ_BYTES / timing["read"].median_s / 1e9
    base = timing.get("ours, int4")
    rows = [_row(e, timing[f"{e.name}, {e.dtype}"], base, prefill or 1, ceiling) for e in found]
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
    """Prints a row per engine."""
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
