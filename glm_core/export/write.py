"""Writes one ONNX file for both prefill and decode, with the KV cache as inputs and outputs.

Shapes: B batch, L tokens of the call, S keys of the cache before it, K kv heads, E head dim, V
vocabulary."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glm_core import dispatch, ops
from glm_core.config import ModelConfig, to_dict
from glm_core.errors import CheckpointError, UnsupportedOpError
from glm_core.export.graph import Graph
from glm_core.export.translate import translate
from glm_core.export.value import Value
from glm_core.model.cache import Window
from glm_core.model.glm import GLM
from glm_core.model.quantize import QuantizedHeads, QuantizedLinear

FORMAT = "glm-core onnx 1"
MODEL = "model.onnx"


def cache_names(config: ModelConfig) -> list[str]:
    """Returns the names of the cache's tensors: each layer's keys and values, or latents."""
    kinds = ("latent",) if config.kv_latent else ("key", "value")
    return [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in kinds]


class Past(Window):
    """The cache as inputs and outputs of the graph: keys and values [B, K, S, E] of each layer, or
    its latents, of one head."""

    def __init__(self, graph: Graph, heads: int, width: int) -> None:
        self._graph, self._heads, self._width = graph, heads, width

    def append(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Does what Window.append does, with values of the graph."""
        return self._grown(f"{layer}.key", k), self._grown(f"{layer}.value", v)

    def append_latent(self, layer: int, latent: Any) -> Any:
        """Does what Window.append_latent does, with values of the graph."""
        return self._grown(f"{layer}.latent", latent)

    def _grown(self, name: str, new: Value) -> Value:
        g, past, present = self._graph, f"past_key_values.{name}", f"present.{name}"
        shape = ("batch", self._heads, "past", self._width)
        g.port("input", past, torch.float32, shape)
        rest = new.transpose(1, 2)  # [B, K, L, E]
        grown = g.node("Concat", past, rest.name, axis=2)
        g.name_output(grown, present)
        g.port("output", present, torch.float32, (*shape[:2], "keys", shape[3]))
        keys = rest.like(grown, (0, self._heads, 0, self._width))  # [B, K, S + L, E]
        return keys.transpose(1, 2)  # [B, S + L, K, E]


def export(
    model: GLM, folder: str | Path, *, copied_files: Sequence[Path] = (), **facts: str
) -> Path:
    """Writes FOLDER/model.onnx and FOLDER/model.onnx.data, and returns the first. FOLDER appears
    only when both are complete. copied_files: files to copy there. facts: entries of the file's
    metadata, in addition to `format`, `config` and `quantization`.

    Inputs: input_ids [B, L] int64, positions [B, 2, L] int64, key_start and key_end [B, L] int64
    (the mask, see ops.attention; keys are counted from the first of the cache),
    past_key_values.I.key and .value [B, K, S, E] float32, with S = 0 at first. Outputs: logits [B,
    V] float32 of the last token, present.I.key and .value [B, K, S + L, E]. Latent attention has
    one tensor a layer instead, .latent [B, 1, S, C + R].

    Raises CheckpointError if FOLDER exists or cannot be written, UnsupportedOpError for a model
    that cannot be exported."""
    require_onnx()
    _require_exportable(model)
    folder = Path(folder)
    require_free(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(model, partial / MODEL, facts)
        for file in copied_files:
            shutil.copy(file, partial)
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: not written ({error}); make room, then repeat") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / MODEL


def require_onnx() -> None:
    """Raises UnsupportedOpError if the onnx package is not installed."""
    if importlib.util.find_spec("onnx") is None:
        raise UnsupportedOpError("export: onnx is not installed; pip install 'glm-core[onnx]'")


def require_free(folder: Path) -> None:
    """Raises CheckpointError if the folder exists."""
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose a new folder, or remove it")


def _require_exportable(model: GLM) -> None:
    dtype = model.embedding.dtype
    if dtype != torch.float32:
        raise UnsupportedOpError(
            f"export: the model is in {str(dtype).removeprefix('torch.')}, but ONNX Runtime's CPU "
            "provider computes in float32; load it as float32, or quantize its linear layers"
        )
    if model.config.rope_scaling == "dynamic":
        raise UnsupportedOpError(
            "export: rope_scaling=dynamic changes the frequencies with a text's length, and a "
            "graph holds one set; export with linear, yarn or llama3 scaling"
        )
    if any(isinstance(m, QuantizedHeads) for m in model.modules()):
        raise UnsupportedOpError(
            "export: a graph holds no latent attention in codes yet; export the model in float32"
        )
    if hasattr(model, "prefix"):
        raise UnsupportedOpError(
            "export: the model has a prefix (P-Tuning); export the base, and feed the prefix as "
            "the first keys and values of the cache"
        )


def _write(model: GLM, path: Path, facts: dict[str, str]) -> None:
    import onnx

    graph = Graph(path.with_name(path.name + ".data"))
    try:
        graph.call_weights({**dict(model.named_parameters()), **dict(model.named_buffers())})
        _trace(model, graph)
    finally:
        graph.close()
    how = next((m.quantization for m in model.modules() if isinstance(m, QuantizedLinear)), None)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(model.config)),
        "quantization": json.dumps(to_dict(how) if how else None),
        **facts,
    }
    onnx.save(graph.model(metadata), path)
    onnx.checker.check_model(path, full_check=True)


def _trace(model: GLM, graph: Graph) -> None:
    c = model.config
    ports = {
        "input_ids": ("batch", "length"),
        "positions": ("batch", 2, "length"),
        "key_start": ("batch", "length"),
        "key_end": ("batch", "length"),
    }
    inputs = []
    for name, shape in ports.items():
        graph.port("input", name, torch.int64, shape)
        sizes = [n if isinstance(n, int) else 0 for n in shape]
        inputs.append(Value(graph, name, sizes, torch.int64))
    with dispatch.intercept(translate):
        hidden = model(*inputs, Past(graph, c.key_heads, c.key_dim))  # [B, L, D]
        logits = ops.linear(hidden[:, -1], model.head_weight)
    graph.name_output(logits.name, "logits")
    graph.port("output", "logits", torch.float32, ("batch", c.vocab))
