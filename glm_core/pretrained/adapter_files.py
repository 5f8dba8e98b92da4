"""Adapters on the disk: our file, which holds them alone, and the prefixes that ChatGLM's own
fine-tuning leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm_core.config import from_dict, to_dict
from glm_core.errors import CheckpointError, ConfigError
from glm_core.model.adapters import AdapterConfig, adapter_state, attach
from glm_core.model.glm import GLM
from glm_core.model.prefix import Prefix
from glm_core.pretrained.weights.stored import scan, some

FORMAT = "glm-core adapter 1"
NAME = "adapter.safetensors"
"""in the folder of a run"""
PUBLISHED = {
    "embedding.weight": "prefix.table",
    "trans.0.weight": "prefix.inner.weight",
    "trans.0.bias": "prefix.inner.bias",
    "trans.2.weight": "prefix.outer.weight",
    "trans.2.bias": "prefix.outer.bias",
}
"""ChatGLM's names below prefix_encoder (modeling_chatglm.py, PrefixEncoder), and ours"""
FRONT = "transformer.prefix_encoder."
ENCODER = re.compile(r"(?:.*\.)?prefix_encoder\.(.+)")
DROPOUT = 0.1
"""of ChatGLM's prefixes, which no file of theirs says (modeling_chatglm.py, ChatGLMModel)"""
State = dict[str, Tensor]


def save_adapter(path: str | Path, model: GLM, config: AdapterConfig) -> None:
    """Writes the adapters of a model, as `write`. Raises CheckpointError."""
    state = {n: t.detach().cpu().contiguous() for n, t in adapter_state(model).items()}
    write(path, config, state)


def load_adapter(path: str | Path, model: GLM, *, train: bool = False) -> AdapterConfig:
    """Attaches saved adapters to a base and says what is attached: for use, without dropout and
    with a prefix's projection folded into its table, or to train on. Raises CheckpointError for a
    file that is something else or fits another base, and leaves the model as it was."""
    config, state = read(path)
    with torch.device("meta"):
        sizes = adapter_state(attach(GLM(model.config), config))
    odd = [
        f"{n} is {list(state[n].shape) if n in state else 'missing'}, "
        f"expected {list(sizes[n].shape) if n in sizes else 'nothing'}"
        for n in sorted(state.keys() | sizes.keys())
        if n not in state or n not in sizes or state[n].shape != sizes[n].shape
    ]
    if odd:
        raise CheckpointError(
            f"{path}: does not fit this base: {some(odd, 3)}; load the base that it was trained on"
        )
    attach(model, config)
    with torch.no_grad():
        for name, parameter in adapter_state(model).items():
            parameter.copy_(state[name])
    return config if train else _for_use(model, config)


def _for_use(model: GLM, config: AdapterConfig) -> AdapterConfig:
    model.eval().requires_grad_(False)
    if isinstance(prefix := getattr(model, "prefix", None), Prefix):
        prefix.fold()
    return dataclasses.replace(config, dropout=0.0, prefix_projection=False, prefix_width=0)


def read(path: str | Path) -> tuple[AdapterConfig, State]:
    """An adapter file of ours, a run's folder that has one, or a file or folder with ChatGLM's
    prefix_encoder.*, alone or among other weights. Raises CheckpointError."""
    path = Path(path)
    path = path / NAME if (path / NAME).is_file() else path
    if path.is_file() and path.suffix == ".safetensors":
        with _opened(path) as file:
            header: dict[str, str] = file.metadata() or {}
            if header.get("format") == FORMAT:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _config(path, header), state
    return _published(path)


def write(path: str | Path, config: AdapterConfig, state: State) -> None:
    """By the ending of its name a .safetensors file of ours, or ChatGLM's pytorch_model.bin, which
    can only hold a prefix. Raises CheckpointError; nothing is half written."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".safetensors":
            save_file(state, part, {"format": FORMAT, "config": json.dumps(to_dict(config))})
        else:
            torch.save(_their_names(path, state), part)
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: not saved ({error}); make room, then repeat") from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated or not an adapter ({error})") from None


def _config(path: Path, header: dict[str, str]) -> AdapterConfig:
    try:
        return from_dict(AdapterConfig, json.loads(header["config"]))
    except (ValueError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: not an adapter of ours ({error})") from None


def _published(path: Path) -> tuple[AdapterConfig, State]:
    stored = {
        m[1]: s
        for table in scan(path).ranks
        for key, s in table.items()
        if (m := ENCODER.fullmatch(key))
    }
    if not stored:
        raise CheckpointError(
            f"{path}: holds no adapter; expected {NAME} of a run, or prefix_encoder.* of ChatGLM"
        )
    table = stored.get("embedding.weight")
    if (
        table is None
        or len(table.shape) != 2
        or stored.keys() not in ({"embedding.weight"}, PUBLISHED.keys())
    ):
        raise CheckpointError(
            f"{path}: prefix_encoder holds {some(sorted(stored))}; expected "
            "embedding.weight [P, W], alone or with trans.0 and trans.2; fetch it again"
        )
    state = {PUBLISHED[name]: found.read() for name, found in stored.items()}
    length, width = table.shape
    projected = len(state) > 1
    config = AdapterConfig(
        kind="ptuning",
        prefix_length=length,
        dropout=DROPOUT,
        prefix_projection=projected,
        prefix_width=width if projected else 0,
    )
    return config, state


def _their_names(path: Path, state: State) -> State:
    names = {ours: FRONT + theirs for theirs, ours in PUBLISHED.items()}
    if path.suffix != ".bin" or not state.keys() <= names.keys():
        raise CheckpointError(
            f"{path}: an adapter is written as .safetensors, and a prefix also as ChatGLM's "
            "pytorch_model.bin; choose one of these"
        )
    return {names[name]: tensor for name, tensor in state.items()}
