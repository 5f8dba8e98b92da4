"""LoRA adapters as the `peft` package saves them: adapter_config.json, adapter_model.safetensors.

Names and rows are those of the layout that peft wrapped; ours are made from them and the base's
sizes. Source: peft 0.21 tuners/lora/config.py, tuners/lora/layer.py, utils/save_and_load.py.
Shapes: R rank, D input width, F output width."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm_core.config import ModelConfig
from glm_core.errors import CheckpointError
from glm_core.model.adapters import AdapterConfig
from glm_core.model.glm import GLM, LINEARS
from glm_core.pretrained.weights.files import read_json, scan, some
from glm_core.pretrained.weights.layouts import LAYOUTS, Layout, recognised
from glm_core.pretrained.weights.sharding import from_heads, to_heads

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ROOT = "base_model.model."
"""what peft puts before the names of the model that it wraps"""
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
WRITABLE = ("chatglm2", "chatglm-6b", "glm", "glm4")
"""layouts of models that peft can wrap"""
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
)
NEUTRAL = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "modules_to_save",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
"""keys that change nothing that the tensors do not show"""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""values of init_lora_weights that leave the base as it is"""
State = dict[str, Tensor]


class Pair(NamedTuple):
    """The two matrices of one LoRA of peft's, and the factor of their product."""

    a: Tensor
    """[R, D]"""
    b: Tensor
    """[F, R]"""
    scale: float


def read(folder: Path, base: ModelConfig) -> tuple[AdapterConfig, State]:
    """Returns the config and tensors of the adapter in a folder, for a base of these sizes. q, k
    and v become one LoRA of the sum of their ranks, smaller ranks are filled up with zeros, and a
    scale that differs from the others goes into B, so the products stay the same. Raises
    CheckpointError."""
    config = _checked_config(folder / CONFIG)
    pairs = _pairs(folder, config)
    layout, prefix = _layout(folder, set(pairs), base)
    linears: dict[str, list[tuple[int, Pair]]] = {}
    for name, (_, columns) in _linears(base).items():
        first_row = 0
        for key, rows in zip(*_modules(layout, name, base), strict=True):
            if pair := pairs.pop(prefix + key, None):
                _require_shape(f"{folder}: {prefix}{key}", pair, (rows, columns))
                linears.setdefault(name, []).append((first_row, pair))
            first_row += rows
    if pairs:
        raise CheckpointError(
            f"{folder}: adapts what is no linear layer of a block of this base: "
            f"{some(sorted(pairs))}; give the base that it was trained on"
        )
    rank = max(sum(len(pair.a) for _, pair in parts) for parts in linears.values())
    scale = next(iter(linears.values()))[0][1].scale
    targets = [t for t in LINEARS if any(n.endswith(t) for n in linears)]
    state: State = {}
    for name, (rows, columns) in _linears(base).items():
        if name.endswith(tuple(targets)):
            a, b = _joined(linears.get(name, []), (rows, rank, columns), scale)
            if layout.qkv == "heads" and name.endswith(".qkv"):
                b = from_heads(b, base.num_heads)
            state |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    dropout = float(config.get("lora_dropout") or 0.0)
    how = AdapterConfig(rank=rank, alpha=scale * rank, targets=" ".join(targets), dropout=dropout)
    return how, state


def write(
    folder: Path, config: AdapterConfig, state: State, layout: Layout, base: ModelConfig
) -> None:
    """Writes a LoRA into a new folder, under the names of the base in this layout. Raises
    CheckpointError."""
    if config.kind != "lora" or layout.name not in WRITABLE:
        raise CheckpointError(
            f"{folder}: peft takes a LoRA of a model in layout {', '.join(WRITABLE)}, this is a "
            f"{config.kind} of layout {layout.name}; give such a base, or write X.safetensors"
        )
    tensors, leaves = {}, set()
    for name in _linears(base):
        if f"{name}.lora_a" not in state:
            continue
        a, b = state[f"{name}.lora_a"], state[f"{name}.lora_b"]
        if layout.qkv == "heads" and name.endswith(".qkv"):
            b = to_heads(b, base.num_heads)
        modules, lengths = _modules(layout, name, base)
        for module, part in zip(modules, b.split(lengths), strict=True):
            leaves.add(module.rpartition(".")[2])
            tensors[f"{ROOT}{module}.lora_A.weight"] = a.clone()
            tensors[f"{ROOT}{module}.lora_B.weight"] = part.contiguous()
    whole = config.alpha == int(config.alpha)
    theirs = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if whole else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(leaves),
        "bias": "none",
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / WEIGHTS[0], {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: not written ({error}); choose a new folder") from None


def _checked_config(file: Path) -> dict[str, Any]:
    """Returns the config of a LoRA. Raises CheckpointError for another kind of adapter, and names
    every key that would change the result and is not read."""
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}, only 'LORA' is read; train a LoRA")
    odd = [f"{k}={v!r}"[:60] for k, v in config.items() if v and k not in (*READ, *NEUTRAL)]
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        odd.append(f"init_lora_weights={start!r}")  # the base was changed too
    if odd:
        raise CheckpointError(
            f"{file}: not supported: {', '.join(odd)}; merge the adapter with peft, then give the "
            "merged model"
        )
    return config


def _pairs(folder: Path, config: dict[str, Any]) -> dict[str, Pair]:
    """Returns the LoRAs by the name of the module that they adapt."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: holds {CONFIG} but no {WEIGHTS[0]}; fetch it")
    [table] = scan(file).ranks
    found: dict[str, State] = {}
    other = []
    for key, stored in table.items():
        if match := KEY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = stored.read()
        else:
            other.append(key)
    other += [name for name, pair in found.items() if len(pair) < 2 or not _fit(**pair)]
    if other or not found:
        raise CheckpointError(
            f"{file}: expected lora_A and lora_B of linear layers alone, found "
            f"{some(other) or 'none'}; merge the adapter with peft, then give the merged model"
        )
    return {n: Pair(t["A"], t["B"], _scale(config, n, len(t["A"]))) for n, t in found.items()}


def _require_shape(subject: str, pair: Pair, expected: tuple[int, int]) -> None:
    shape = (len(pair.b), pair.a.shape[1])
    if shape != expected:
        raise CheckpointError(
            f"{subject} adapts a layer of {list(shape)}, the base has {list(expected)}; give the "
            "base that it was trained on"
        )


def _fit(A: Tensor, B: Tensor) -> bool:  # their names
    return A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Returns the factor of a LoRA's product (tuners/lora/layer.py, update_layer)."""
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (v for k, v in patterns if re.match(rf"(.*\.)?({k})$", module))
    alpha = float(next(own, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _layout(folder: Path, modules: set[str], base: ModelConfig) -> tuple[Layout, str]:
    """Returns the layout that names all these modules, and the prefix before its names."""
    keys = {f"{module}.weight" for module in modules}
    for layout in LAYOUTS:
        fits = layout.fixed.get("positions", base.positions) == base.positions
        for prefix in layout.prefixes if fits else ():
            if recognised(layout, prefix, keys) == keys:
                return layout, prefix
    raise CheckpointError(
        f"{folder}: adapts {some(sorted(modules))}, which are not modules of this base in any "
        "layout; give the base that it was trained on"
    )


@functools.lru_cache(maxsize=4)
def _linears(base: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns rows and columns of the linear layers of every block."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in GLM(base).named_parameters()}
    names = [f"blocks.{i}.{name}" for i in range(base.num_layers) for name in LINEARS]
    held = ((n, shapes[f"{n}.weight"]) for n in names if f"{n}.weight" in shapes)
    return {n: (shape[0], shape[1]) for n, shape in held}


def _modules(layout: Layout, name: str, base: ModelConfig) -> tuple[list[str], list[int]]:
    """Returns the names of the layout's modules that make up our linear layer, and how many rows
    each of them has."""
    parts = layout.parts(f"{name}.weight", _linears(base)[name], base)
    return [key.removesuffix(".weight") for key in parts], [shape[0] for shape in parts.values()]


def _joined(
    parts: list[tuple[int, Pair]], shape: tuple[int, int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Returns A and B of one LoRA of shape (F, R, D) that adds what the parts add, each from its
    first row on."""
    rows, rank, columns = shape
    dtype = parts[0][1].a.dtype if parts else torch.float32
    a, b = torch.zeros(rank, columns, dtype=dtype), torch.zeros(rows, rank, dtype=dtype)
    first = 0
    for row, pair in parts:
        places = slice(first, first + len(pair.a))
        a[places] = pair.a
        b[row : row + len(pair.b), places] = pair.b * (pair.scale / scale)
        first = places.stop
    return a, b
