"""Computes each row of a call with a LoRA of its own, or with none: one base serves many adapters.

The rows of a decode step stay one batch: the base's products are computed for all of them at once,
and each adapter's two small products for its own rows.

Shapes: B rows, L tokens, D input width, F output width, R rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.errors import ConfigError
from glm_core.model.adapters import AdapterConfig, adapter_state
from glm_core.model.glm import GLM


class _Pair(NamedTuple):
    """One LoRA of one linear layer."""

    a: Tensor
    """[R, D]"""
    b: Tensor
    """[F, R]"""
    scale: float


class _Rows:
    """Which rows of the call under way belong to which adapter."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}
        """row numbers by adapter"""


class _RowLoRA(nn.Module):
    """y = base(x), and in an adapter's rows + scale x A^T B^T, as model.adapters.LoRA adds it."""

    def __init__(self, base: nn.Module, rows: _Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.pairs: dict[str, _Pair] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, L, D] to [B, L, F]."""
        y: Tensor = self.base(x)
        for name, rows in self.rows.of.items():
            if pair := self.pairs.get(name):
                low = ops.linear(x[rows], pair.a)  # [rows, L, R]
                y[rows] = y[rows] + pair.scale * ops.linear(low, pair.b)
        return y


class LoRAs:
    """The adapters that one base serves, by name. The base itself is not changed; its weights are
    shared."""

    def __init__(self, base: GLM) -> None:
        """Raises ConfigError for a base with an adapter of its own."""
        if adapter_state(base):
            raise ConfigError("adapters: the model has one for all requests already; leave one out")
        self._base, self._rows = base, _Rows()
        self._model = _shell(base)
        self.names: list[str] = []

    def add(self, name: str, config: AdapterConfig, state: Mapping[str, Tensor]) -> None:
        """Adds an adapter with the tensors of `adapter_state`. Raises ConfigError for a prefix, and
        for a name that is taken."""
        if config.kind != "lora":
            raise ConfigError(f"adapter {name}: is a {config.kind}; only a LoRA goes by request")
        if name in self.names:
            raise ConfigError(f"adapter {name}: the name is taken; choose another")
        self.names.append(name)
        like = self._base.embedding
        for key in (k.removesuffix(".lora_a") for k in state if k.endswith(".lora_a")):
            a, b = (state[f"{key}.lora_{leaf}"].to(like.device, like.dtype) for leaf in "ab")
            self._wrapped(key).pairs[name] = _Pair(a, b, config.alpha / config.rank)

    def model_of(self, adapters: Sequence[str]) -> GLM:
        """Returns the model that computes row b with the adapter `adapters[b]`, empty: with none.
        It holds for the next call."""
        if not any(adapters):
            return self._base
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapters):
            if name:
                rows.setdefault(name, []).append(row)
        device = self._base.embedding.device
        self._rows.of = {n: torch.tensor(r, device=device) for n, r in rows.items()}
        return self._model

    def _wrapped(self, key: str) -> _RowLoRA:
        """Returns the linear layer of this name as one that adds LoRAs."""
        parent, _, leaf = key.rpartition(".")
        holder = self._model.get_submodule(parent)
        module = getattr(holder, leaf)
        if not isinstance(module, _RowLoRA):
            module = _RowLoRA(module, self._rows)
            setattr(holder, leaf, module)
        return module


M = TypeVar("M", bound=nn.Module)


def _shell(module: M) -> M:
    """Returns a module with the same parameters, whose submodules can be replaced without changing
    the first."""
    shell = copy.copy(module)
    shell._modules = {n: m if m is None else _shell(m) for n, m in module._modules.items()}
    return shell
