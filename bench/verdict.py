"""Measures the verdict on programs: `python -m glm_core.bench.verdict [--only NAME,...] [--out
FILE]`. Tiny models of transformers are trained two steps each; the second is judged. The same run
tries the planted faults of every operator on its first calls: each is judged as if the operator had
computed it. What an operator's other calls show does not change with a fault, because each call is
judged on its own arguments. A run that FILE has already is not made again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_core.align import statistics
from glm_core.align.verdict import FALSE_ALARM_RATE
from glm_core.faults.aten import ATEN_FAULTS, AtenFault
from glm_core.measure.timing import machine
from glm_core.verdict import oracle, watch
from glm_core.verdict.capture import Capture
from glm_core.verdict.judge import judge

CALLS_PER_FAULT = 3
"""a fault is tried on so many calls of its operator, until one shows it"""
V, L, D = 320, 32, 64
"""vocabulary, sequence and width of the tiny models"""

_SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
_LLAMA = _SMALL | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": D, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": V}
_BART = {"d_model": D, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": V}
_BART |= {
    f"{side}_{part}": n
    for side in ("encoder", "decoder")
    for part, n in (("attention_heads", 4), ("ffn_dim", 128))
}
_IMAGE = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "CausalLM",
        {"n_embd": D, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 64},
    ),
    "llama": ("CausalLM", _LLAMA),
    "qwen2": ("CausalLM", _LLAMA),
    "qwen3": ("CausalLM", _LLAMA),
    "mixtral": ("CausalLM", _LLAMA | {"num_local_experts": 4}),
    "bert": ("MaskedLM", _SMALL | {"intermediate_size": 128}),
    "t5": ("Seq2SeqLM", _T5 | {"decoder_start_token_id": 0}),
    "vit": ("ImageClassification", _IMAGE),
    "mamba": (
        "CausalLM",
        {"hidden_size": D, "num_hidden_layers": 2, "vocab_size": V, "state_size": 8},
    ),
    "whisper": (
        "SpeechSeq2Seq",
        _BART
        | {
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
        },
    ),
    "opt": (
        "CausalLM",
        _SMALL | {"ffn_dim": 128, "word_embed_proj_dim": D, "max_position_embeddings": 64},
    ),
    "gpt_neox": ("CausalLM", _SMALL | {"intermediate_size": 128}),
    "gemma": ("CausalLM", _LLAMA),
    "bloom": ("CausalLM", {"hidden_size": D, "n_layer": 2, "n_head": 4, "vocab_size": V}),
    "phi": ("CausalLM", _SMALL | {"intermediate_size": 128}),
    "distilbert": (
        "MaskedLM",
        {"dim": D, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": V},
    ),
    "albert": ("MaskedLM", _SMALL | {"intermediate_size": 128, "embedding_size": 32}),
    "bart": ("Seq2SeqLM", _BART | {"max_position_embeddings": 64}),
    "convnext": (
        "ImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    ),
    "resnet": (
        "ImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    ),
}
"""by transformers' name: the task and the config"""


def model_of(name: str) -> nn.Module:
    """Returns a tiny model with random weights."""
    import transformers

    task, options = MODELS[name]
    ids = {} if task == "ImageClassification" else _IDS
    config = transformers.AutoConfig.for_model(name, **ids | options)
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    return model


def batch_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a random batch for a model's task."""
    task = MODELS[name][0]
    ids = torch.randint(3, V, (4, L))
    if task == "ImageClassification":
        return {"pixel_values": torch.randn(4, 3, 32, 32, dtype=dtype), "labels": ids[:, 0] % 2}
    if task == "SpeechSeq2Seq":
        return {"input_features": torch.randn(4, 16, 32, dtype=dtype), "labels": ids}
    return {"input_ids": ids, "labels": ids}


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cuts a batch in two."""
    cut = {name: x.chunk(2) for name, x in batch.items()}
    return [{name: x[i] for name, x in cut.items()} for i in range(2)]


class Trial(Capture):
    """Judges as the watch does, and tries the planted faults on the same calls."""

    dtype = "float32"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tried: Counter[str] = Counter()
        self.shown: set[str] = set()
        self.z = statistics.critical_z(FALSE_ALARM_RATE, 2_000_000)

    def _judge(self, call: oracle.Call, actual: oracle.Results, flops: float) -> None:
        super()._judge(call, actual, flops)
        for fault in ATEN_FAULTS:
            wanted = self.tried[fault.name] < CALLS_PER_FAULT and fault.name not in self.shown
            if fault.operator == call.func._schema.name and self.dtype in fault.dtypes and wanted:
                self._try(fault, call, actual)

    def _try(self, fault: AtenFault, call: oracle.Call, actual: oracle.Results) -> None:
        run: Callable[..., Any] = lambda *a, **k: fault.wrong(call.func, *a, **k)  # noqa: E731
        try:
            wrong = oracle.compute(call, None, None, run)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return  # the fault is written for other arguments
        if all(torch.equal(y, wrong[n]) for n, y in actual.items()):
            return  # it changes nothing here
        self.tried[fault.name] += 1
        judgement = judge(call, wrong, self.docket.least_z)
        if any(o.ratio(self.z) > 1 for o in judgement.outside):
            self.shown.add(fault.name)


VARIANTS = ("plain", "fused", "foreach", "math", "threads", "split", "channels_last")
"""honest ways to run a step: AdamW in one kernel or by lists, attention by its formula, 2 threads,
the batch in two halves, images with their channels last"""


def train(
    name: str, dtype: torch.dtype, variant: str, trial: bool, seed: int = 1
) -> dict[str, Any]:
    """Trains two steps and judges the second. Returns the figures."""
    torch.manual_seed(seed)
    torch.set_num_threads(2 if variant == "threads" else 1)
    model, batch = model_of(name).to(dtype), batch_of(name, dtype)
    if variant == "channels_last":
        for weight in model.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    adam = torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=variant == "fused", foreach=variant == "foreach"
    )
    begin = time.process_time()
    watched = watch(model, adam, steps=(2,), program=name)
    if trial:
        watched.mode = Trial(watched.docket, watched.places)
        watched.mode.dtype = str(dtype).removeprefix("torch.")
    kernel: AbstractContextManager[Any] = nullcontext()
    if variant == "math":
        kernel = sdpa_kernel(SDPBackend.MATH)
    plain = 0.0
    with kernel, watched:
        for _ in range(2):
            first = time.process_time()
            for part in halves(batch) if variant == "split" else [batch]:
                model(**part).loss.backward()
            adam.step()
            adam.zero_grad()
            plain = plain or time.process_time() - first
    report = watched.report()
    row = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "variant": variant,
        "guilty": [str(f) for f in report.findings],
        "calls": report.judged,
        "operators": len(report.operators),
        "tests": report.num_tests,
        "worst_ratio": max(r.ratio for r in report.operators),
        "not_judged_flops": sum(u.flops_share for u in report.not_judged),
        "not_judged": {u.operator: u.reason for u in report.not_judged},
        "plain_step_cpu_s": plain,
        "judged_cpu_s": time.process_time() - begin,
        "peak_memory_mib": report.peak_memory_bytes / 2**20,
    }
    if isinstance(watched.mode, Trial):
        row |= {"tried": sorted(watched.mode.tried), "found": sorted(watched.mode.shown)}
    return row


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Returns the runs that a file holds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if "model" in row]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the figures of each run that the file does not have."""
    held = rows_of(Path(args.out)) if args.out else []
    done = {(row["model"], row["dtype"], row["variant"]) for row in held}
    for name in args.only.split(",") if args.only else MODELS:
        for dtype in args.dtypes.split(","):
            for variant in args.variants.split(","):
                if (name, dtype, variant) in done:
                    continue
                try:
                    yield train(name, getattr(torch, dtype), variant, variant == "plain")
                except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                    run = {"model": name, "dtype": dtype, "variant": variant}
                    yield run | {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Runs the campaign; each run is a line of JSON as soon as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models, divided by commas (default: all)")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--variants", default="plain", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", help="file to add the lines to (default: stdout)")
    args = parser.parse_args()
    with open(args.out, "a", encoding="utf-8") if args.out else nullcontext(sys.stdout) as file:
        print(json.dumps({"machine": machine()}, default=str), file=file, flush=True)
        for row in rows(args):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
