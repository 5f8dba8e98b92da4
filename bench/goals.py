"""Measures the goals of decoding and prefill on one device: `python -m glm_core.bench.goals
--backend cuda`.

A goal is a share of what the device reaches in the same rounds (a read of memory, a product of
large matrices) or a ratio of two of our own figures, so that it means the same on every device. The
shares stand for the figures that are asked of an H100: 135 tokens/s in bfloat16 and 360 in int4 for
GLM-4-9B, 45 ms for a prompt of 1,024 tokens."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import usable, use
from glm_core.bench import decode, goals_peers
from glm_core.config import ModelConfig
from glm_core.measure.ceilings import contestants, finished
from glm_core.measure.memory import free_bytes
from glm_core.measure.timing import Timing, interleave, machine
from glm_core.model.generate import Decoder
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.runner import DecodeRow, Runner
from glm_core.model.sample import Sampling
from glm_core.session import Session

Call = Callable[[], Any]
PROMPT, LONG_PROMPT, SEQUENCES = 64, 1024, 64
TURN = 8
"""tokens that are decoded in a turn"""
GOALS = {
    "product int8, one row": ("read_share", 0.75),
    "product int4, one row": ("read_share", 0.70),
    "decode half": ("read_share", 0.80),
    "decode int4": ("read_share", 0.65),
    f"decode half, {SEQUENCES} sequences": ("times_one_sequence", 20.0),
    f"prefill {LONG_PROMPT} half": ("gemm_share", 0.50),
    f"prefill {LONG_PROMPT} int4": ("speed_of_half", 0.90),
}
"""work -> the figure that is judged and the least that is asked of it. `half` is bfloat16, or
float16 where the device has no bfloat16"""
BESIDE = "decode half, beside transformers"
PEER_GOALS = {
    BESIDE: ("times_compiled", 1.5),
    goals_peers.WIDE: ("times_compiled", 1.25),
    f"{goals_peers.WIDE}, products": ("gemm_share", 0.72),
    goals_peers.NARROW: ("times_compiled", 4.5),
}
"""the same of `measure_beside`. The shares stand for 540 TFLOP/s where a large product reached 747,
and for 5 ms where the compiled peer took 22.5"""
KINDS = ("eager", "compiled")
Rows = dict[str, dict[str, Any]]


def config_for(backend: Backend) -> ModelConfig:
    """Returns GLM-4-9B with as many layers as the device's free memory holds, transformers' copy
    beside it; on the CPU the smaller model of the decode bench."""
    if backend.device_type == "cpu":
        return decode.shapes()
    whole = preset("glm-4-9b", max_length=2 * LONG_PROMPT)
    free_now = free_bytes(backend.device())
    if free_now is None:
        return whole
    free = free_now * 0.8 - 4 * whole.vocab * whole.hidden
    width = (whole.num_heads + 2 * whole.num_kv_heads) * whole.head_dim + whole.hidden
    layer = 2 * whole.hidden * (width + 3 * whole.ffn)
    layers = max(1, min(whole.num_layers, int(free / (2.6 * layer))))
    return preset("glm-4-9b", max_length=2 * LONG_PROMPT, num_layers=layers)


def measure(backend: Backend, config: ModelConfig, rounds: int) -> dict[str, Any]:
    """Returns a row for each work of GOALS, and the goals that were missed."""
    rows: Rows = {}
    with use(backend, strict=False) as session:
        _products(backend, config, rounds, rows)
        model = _model(config, backend)
        _model_rows(backend, model, "half", rounds, rows)
        for _ in convert(model, Quantization(bits=4, group=_group(config))):
            pass
        _model_rows(backend, model, "int4", rounds, rows)
    _compare(rows)
    return _judged(backend, config, rows, GOALS, session)


def measure_beside(backend: Backend, config: ModelConfig, rounds: int) -> dict[str, Any]:
    """Returns a row for each work of PEER_GOALS, timed in turn with transformers, eager and
    compiled, and the goals that were missed, or have no peer because transformers is not
    installed."""
    half, device = _half(backend), backend.device()
    room = min(4 * PROMPT, config.max_length)
    with use(backend, strict=False) as session:
        calls = {"decode": _decoding(_model(config, backend), 1)}
        if not goals_peers.MISSING:
            calls |= goals_peers.decoders(config, half, device, room, TURN)
        timing, _ = _timed(backend, calls, rounds, "memory read")
        each = {k: timing[k].median_s / TURN * 1e3 for k in calls}
        row = {"ms": each.pop("decode"), **{f"{k}_ms": ms for k, ms in each.items()}}
        rows: Rows = {BESIDE: row | goals_peers.against_peers(timing, "decode")}
        calls.clear()
    rows |= goals_peers.training_rows(backend, str(half).removeprefix("torch."), rounds)
    rows[f"{goals_peers.WIDE}, products"] = rows[goals_peers.WIDE]
    return _judged(backend, config, rows, PEER_GOALS, session)


def _judged(
    backend: Backend,
    config: ModelConfig,
    rows: Rows,
    goals: dict[str, tuple[str, float]],
    session: Session,
) -> dict[str, Any]:
    """Returns the rows with what was missed, and with the facts of the measurement."""
    reached = {name: rows[name].get(figure) for name, (figure, _) in goals.items()}
    return {
        "rows": rows,
        "goals": goals,
        "missed": [n for n, x in reached.items() if x is not None and x < goals[n][1]],
        "unmeasured": [n for n, x in reached.items() if x is None],
        "half": str(_half(backend)).removeprefix("torch."),
        "layers": config.num_layers,
        "fallbacks": {f"{f.op}: {f.reason}": n for f, n in session.fallbacks.items()},
        "machine": machine(),
    }


def _compare(rows: Rows) -> None:
    """Adds the ratios of our own figures."""
    one, many = rows["decode half"], rows[f"decode half, {SEQUENCES} sequences"]
    many["times_one_sequence"] = many["tokens_s"] / one["tokens_s"]
    whole, codes = (rows[f"prefill {LONG_PROMPT} {d}"] for d in ("half", "int4"))
    codes["speed_of_half"] = whole["ms"] / codes["ms"]


def _group(config: ModelConfig) -> int:
    widths = (config.hidden, config.num_heads * config.head_dim, config.ffn)
    return next(g for g in (128, 32, 0) if not g or not any(w % g for w in widths))


def _model(config: ModelConfig, backend: Backend) -> GLM:
    """Returns a model with random weights in half precision, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_half(backend))
    try:
        with backend.device():
            return decode.randomly(GLM(config)).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _half(backend: Backend) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in backend.dtypes else torch.float16


def _timed(
    backend: Backend, calls: dict[str, Call], rounds: int, ceiling: str
) -> tuple[dict[str, Timing], float]:
    """Times the calls and a ceiling in turn. Returns the times, and FLOPs or bytes per second of
    the ceiling."""
    run, flops, moved = contestants(backend, (_half(backend),))[ceiling]
    timing = interleave(
        {n: finished(backend, c) for n, c in {ceiling: run, **calls}.items()}, rounds
    )
    return timing, (flops or moved) / timing[ceiling].median_s


def _products(backend: Backend, config: ModelConfig, rounds: int, rows: Rows) -> None:
    """Times a decode step's widest product: of one row, in each precision."""
    device, width, outputs = backend.device(), config.hidden, 2 * config.ffn
    x = torch.randn(1, width, device=device).to(_half(backend))
    weight = torch.randn(outputs, width, device=device).to(_half(backend))
    calls: dict[str, Call] = {"half": lambda: ops.linear(x, weight)}
    calls["half by torch"] = lambda: torch.nn.functional.linear(x, weight)
    sizes = dict.fromkeys(calls, weight.nbytes)
    for bits in (8, 4):
        codes = torch.randint(-128, 128, (outputs, width * bits // 8), device=device).to(torch.int8)
        group = _group(config) or width
        scale = torch.rand(outputs, width // group, device=device).half()
        product = functools.partial(ops.quantized_linear, x, codes, scale, None, bits)
        calls[f"int{bits}"] = product
        sizes[f"int{bits}"] = codes.nbytes + scale.nbytes
    times = 20  # in a row: one takes little more than the wait for it

    def turn(call: Call) -> Call:
        return lambda: [call() for _ in range(times)]

    timing, read = _timed(backend, {n: turn(c) for n, c in calls.items()}, rounds, "memory read")
    for name, size in sizes.items():
        seconds = timing[name].median_s / times
        figures = {"gb_s": size / seconds / 1e9, "read_share": size / seconds / read}
        rows[f"product {name}, one row"] = {"ms": seconds * 1e3, **figures}


def _model_rows(backend: Backend, model: GLM, dtype: str, rounds: int, rows: Rows) -> None:
    """Times decode steps of one and of many sequences, and the reading of a long prompt."""
    sequences = (1, SEQUENCES) if dtype == "half" else (1,)
    size = decode.read_weights(model)
    for n in sequences:
        timing, read = _timed(backend, {"decode": _decoding(model, n)}, rounds, "memory read")
        seconds = timing["decode"].median_s / TURN
        rows[f"decode {dtype}" + (f", {n} sequences" if n > 1 else "")] = {
            "ms": seconds * 1e3,
            "tokens_s": n / seconds,
            "read_share": size / seconds / read,
            "spread": timing["decode"].spread,
        }
    timing, read = _timed(backend, {"generate": _generating(model)}, rounds, "memory read")
    seconds = timing["generate"].median_s / TURN
    row = {"ms": seconds * 1e3, "tokens_s": 1 / seconds, "read_share": size / seconds / read}
    rows[f"generate {dtype}"] = row
    length = min(LONG_PROMPT, model.config.max_length - 1)
    runner, text = Runner(model, 1, chunk=length), causal(_tokens(model, length))
    gemm = f"gemm {_half(backend)}".replace("torch.", "")
    timing, rate = _timed(backend, {"prefill": lambda: runner.prefill(0, [text])}, rounds, gemm)
    seconds = timing["prefill"].median_s
    row = {"ms": seconds * 1e3, "tokens": length, "tokens_s": length / seconds}
    if dtype == "half":  # codes say nothing of the products' size
        flops = 2.0 * length * sum(p.numel() for p in model.blocks.parameters())
        row["gemm_share"] = flops / seconds / rate
    rows[f"prefill {LONG_PROMPT} {dtype}"] = row


def _tokens(model: GLM, count: int) -> list[int]:
    return [i % model.config.vocab for i in range(count)]


def _decoding(model: GLM, sequences: int) -> Call:
    """Returns a call that decodes TURN tokens greedily for each sequence."""
    room = min(4 * PROMPT, model.config.max_length)
    runner = Runner(model, sequences, room)
    texts = [causal(_tokens(model, min(PROMPT, room // 2)))] * sequences
    runner.prefill(0, texts)
    places = itertools.cycle(range(len(texts[0].tokens), room))

    def turn() -> None:
        for _ in range(TURN):
            place = next(places)
            runner.decode([DecodeRow(7, text, place) for text in texts]).argmax(-1).tolist()

    return turn


def _generating(model: GLM) -> Call:
    """Returns a call that generates TURN tokens as a user does, choice of tokens included."""
    room = min(4 * PROMPT, model.config.max_length)
    decoder = Decoder(Runner(model, 1, room))
    text = causal(_tokens(model, min(PROMPT, room // 2)))

    def turn() -> None:
        for _ in range(TURN):
            if decoder.free:
                decoder.add(text, Sampling(max_tokens=room, temperature=0))
            decoder.step()

    return turn


def main() -> int:
    """Prints a row for each work and a line for each goal."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.goals", description=__doc__)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peers", action="store_true", help="transformers and training steps too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    backend = usable(args.backend)
    measures = (measure, measure_beside) if args.peers else (measure,)
    for each in measures:
        result = each(backend, config_for(backend), args.rounds)
        print(json.dumps(result) if args.json else text(result))
    return 0


def text(result: dict[str, Any]) -> str:
    """Returns the rows, each with its peers' times, and the goals as lines."""
    lines = []
    for name, row in result["rows"].items():
        peers = [f"transformers {k} {row[f'{k}_ms']:.3f}" for k in KINDS if f"{k}_ms" in row]
        facts = ", ".join(filter(None, (row.get("model"), *peers)))
        lines.append(f"{name:36} {row['ms']:9.3f} ms  {facts}".rstrip())
    for name, (figure, least) in result["goals"].items():
        reached = result["rows"][name].get(figure)
        words = "not measured" if reached is None else f"{reached:.2f}"
        words += ", MISSED" if reached is not None and reached < least else ""
        lines.append(f"goal: {name}: {figure} at least {least:.2f}: {words}")
    lines.append(str(result["fallbacks"] or "no fallbacks"))
    return "\n".join([*lines, str(result["machine"])])


if __name__ == "__main__":
    raise SystemExit(main())
