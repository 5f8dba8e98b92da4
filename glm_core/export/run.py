"""Runs an exported file in generation: ONNX Runtime computes, one sequence at a time.

Shapes: B batch (1), K kv heads, S keys of the cache, E head dim, V vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm_core.config import ModelConfig, from_dict
from glm_core.errors import CheckpointError, ConfigError, GenerationError, UnsupportedOpError
from glm_core.export.write import FORMAT, MODEL, cache_names
from glm_core.model.runner import CHUNK, Call, Runner


class Exported(Runner):
    """A Runner over FOLDER/model.onnx that keeps the cache between calls. Raises UnsupportedOpError
    if onnxruntime is not installed, CheckpointError for a file that `export` did not write."""

    def __init__(self, folder: str | Path) -> None:
        self._session = _opened(Path(folder) / MODEL)
        self.facts: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        """the file's metadata: tokenizer, stop, name, ..."""
        self.config = _config(Path(folder) / MODEL, self.facts)
        self.length, self.chunk, self.slots = self.config.max_length, CHUNK, 1
        self._names = cache_names(self.config)
        empty = np.zeros((1, self.config.key_heads, 0, self.config.key_dim), np.float32)
        self._past = [empty] * len(self._names)  # [1, K, S, E]

    def explain(self, call: Call, step: int) -> GenerationError:
        """Returns the error for logits that are not finite; the ops of the graph cannot be
        watched."""
        return GenerationError(
            f"token {step}: the logits of the exported model are not finite; generate from the "
            "checkpoint it was exported from, to see which op"
        )

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu")

    def _whole_step(self, num_rows: int, adapted: bool) -> None:
        return None  # ONNX Runtime runs every step whole

    def _logits(self, call: Call) -> Tensor:
        self._last = lambda: call
        start = int(call.places[0, 0])  # what the cache holds beyond is of an earlier sequence
        feed = {
            "input_ids": call.tokens,
            "positions": call.positions,
            "key_start": call.key_start,
            "key_end": call.key_end,
        }
        inputs = {name: np.ascontiguousarray(x.long().numpy()) for name, x in feed.items()}
        for name, past in zip(self._names, self._past, strict=True):
            inputs[f"past_key_values.{name}"] = past[:, :, :start]
        outputs = ["logits", *(f"present.{name}" for name in self._names)]
        logits, *self._past = self._session.run(outputs, inputs)
        return torch.from_numpy(logits)


def _opened(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UnsupportedOpError(
            f"{path}: onnxruntime is not installed; pip install 'glm-core[onnx]'"
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a folder that glm-core export wrote")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no common base but this
        fact = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be run ({fact}); export it again") from None


def _config(path: Path, facts: dict[str, str]) -> ModelConfig:
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not written by glm-core export ({FORMAT!r}); export it again"
        )
    try:
        return from_dict(ModelConfig, json.loads(facts["config"]))
    except (KeyError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: its metadata describes no model ({error}); export it again"
        ) from None
