"""Adapters on disk: our file, which holds an adapter alone, the folders of the `peft` package, and
the prefix that ChatGLM's own fine-tuning saves."""

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

from glm_core.config import ModelConfig, from_dict, to_dict
from glm_core.errors import CheckpointError, ConfigError
from glm_core.model.adapters import AdapterConfig, adapter_state, attach
from glm_core.model.glm import GLM
from glm_core.model.prefix import Prefix
from glm_core.pretrained import peft
from glm_core.pretrained.weights.files import scan, some

FORMAT = "glm-core adapter 1"
FILE_NAME = "adapter.safetensors"
"""the adapter in a run's folder"""
CHATGLM_NAMES = {
    "embedding.weight": "prefix.table",
    "trans.0.weight": "prefix.inner.weight",
    "trans.0.bias": "prefix.inner.bias",
    "trans.2.weight": "prefix.outer.weight",
    "trans.2.bias": "prefix.outer.bias",
}
"""ChatGLM's names below prefix_encoder (modeling_chatglm.py, PrefixEncoder) to ours"""
CHATGLM_KEY = re.compile(r"(?:.*\.)?prefix_encoder\.(.+)")
CHATGLM_ROOT = "transformer.prefix_encoder."
"""before ChatGLM's names in a file that is written"""
CHATGLM_DROPOUT = 0.1
"""dropout of ChatGLM's prefixes, stated in its code only (modeling_chatglm.py, ChatGLMModel)"""
State = dict[str, Tensor]


def save_adapter(path: str | Path, model: GLM, config: AdapterConfig) -> None:
    """Writes the adapter of a model; `write` says in which format. Raises CheckpointError."""
    state = {n: t.detach().cpu().contiguous() for n, t in adapter_state(model).items()}
    write(path, config, state)


def load_adapter(path: str | Path, model: GLM, *, train: bool = False) -> AdapterConfig:
    """Attaches a saved adapter to a base model and returns its config. For inference (the default)
    dropout is off and the projection of a prefix is folded into its table; with `train` the adapter
    can be trained further. Raises CheckpointError, and leaves the model as it was, if the file is
    not an adapter or fits another base."""
    config, state = read(path, model.config)
    require_fits(path, model.config, config, state)
    attach(model, config)
    with torch.no_grad():
        for name, parameter in adapter_state(model).items():
            parameter.copy_(state[name])
    return config if train else _prepare_inference(model, config)


def require_fits(path: str | Path, base: ModelConfig, config: AdapterConfig, state: State) -> None:
    """Raises CheckpointError unless an adapter has the names and shapes that this base needs."""
    with torch.device("meta"):
        expected = adapter_state(attach(GLM(base), config))
    wrong = [
        f"{n} is {list(state[n].shape) if n in state else 'missing'}, "
        f"expected {list(expected[n].shape) if n in expected else 'nothing'}"
        for n in sorted(state.keys() | expected.keys())
        if n not in state or n not in expected or state[n].shape != expected[n].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit this base: {some(wrong, 3)}; load the base that it was trained "
            "on"
        )


def _prepare_inference(model: GLM, config: AdapterConfig) -> AdapterConfig:
    model.eval().requires_grad_(False)
    if isinstance(prefix := getattr(model, "prefix", None), Prefix):
        prefix.fold()
    return dataclasses.replace(config, dropout=0.0, prefix_projection=False, prefix_width=0)


def read(path: str | Path, base: ModelConfig | None = None) -> tuple[AdapterConfig, State]:
    """Returns the config and tensors of an adapter: from our file, from the folder of a run that
    has one, from a folder of the `peft` package, or from a file or folder with ChatGLM's
    prefix_encoder.*, alone or among other weights. base: sizes of its base, which a folder of
    peft's needs. Raises CheckpointError."""
    path = Path(path)
    if (folder := _peft_folder(path)) is not None:
        if base is None:
            raise CheckpointError(
                f"{folder}: an adapter of the peft package, whose names are its base's; give the "
                "base too (--base PATH)"
            )
        return peft.read(folder, base)
    path = path / FILE_NAME if (path / FILE_NAME).is_file() else path
    if path.is_file() and path.suffix == ".safetensors":
        with _open(path) as file:
            header: dict[str, str] = file.metadata() or {}
            if header.get("format") == FORMAT:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _config(path, header), state
    return _read_chatglm(path)


def _peft_folder(path: Path) -> Path | None:
    """Returns the folder of an adapter of peft's, given the folder or a file in it."""
    folder = path.parent if path.name in (peft.CONFIG, *peft.WEIGHTS) else path
    return folder if (folder / peft.CONFIG).is_file() else None


def write(path: str | Path, config: AdapterConfig, state: State) -> None:
    """Writes an adapter: our format for a name that ends in .safetensors, ChatGLM's
    pytorch_model.bin for one that ends in .bin, which can hold a prefix only. Raises
    CheckpointError; the file is complete or absent."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".safetensors":
            save_file(state, part, {"format": FORMAT, "config": json.dumps(to_dict(config))})
        else:
            torch.save(_chatglm_state(path, state), part)
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: not saved ({error}); make room, then repeat") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: truncated or not an adapter ({error}); fetch it again"
        ) from None


def _config(path: Path, header: dict[str, str]) -> AdapterConfig:
    try:
        return from_dict(AdapterConfig, json.loads(header["config"]))
    except (ValueError, KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: not an adapter of glm-core ({error}); save it again"
        ) from None


def _read_chatglm(path: Path) -> tuple[AdapterConfig, State]:
    stored = {
        m[1]: tensor
        for table in scan(path).ranks
        for key, tensor in table.items()
        if (m := CHATGLM_KEY.fullmatch(key))
    }
    if not stored:
        raise CheckpointError(
            f"{path}: holds no adapter; expected {FILE_NAME} of a run, {peft.CONFIG} with "
            f"{peft.WEIGHTS[0]} of peft, or prefix_encoder.* of ChatGLM"
        )
    table = stored.get("embedding.weight")
    if (
        table is None
        or len(table.shape) != 2
        or stored.keys() not in ({"embedding.weight"}, CHATGLM_NAMES.keys())
    ):
        raise CheckpointError(
            f"{path}: prefix_encoder holds {some(sorted(stored))}; expected "
            "embedding.weight [P, W], alone or with trans.0 and trans.2; fetch it again"
        )
    state = {CHATGLM_NAMES[name]: tensor.read() for name, tensor in stored.items()}
    length, width = table.shape
    projected = len(state) > 1
    config = AdapterConfig(
        kind="ptuning",
        prefix_length=length,
        dropout=CHATGLM_DROPOUT,
        prefix_projection=projected,
        prefix_width=width if projected else 0,
    )
    return config, state


def _chatglm_state(path: Path, state: State) -> State:
    """Returns a prefix under ChatGLM's names."""
    names = {ours: CHATGLM_ROOT + theirs for theirs, ours in CHATGLM_NAMES.items()}
    if path.suffix != ".bin" or not state.keys() <= names.keys():
        raise CheckpointError(
            f"{path}: an adapter is written as .safetensors, and a prefix also as ChatGLM's "
            "pytorch_model.bin; choose one of these"
        )
    return {names[name]: tensor for name, tensor in state.items()}
