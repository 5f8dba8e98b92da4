"""Fine-tunes a model whose base stays frozen: LoRA on its linear layers, or a prefix (P-Tuning v2).

Shapes: D input width, F output width, R rank, P prefix length."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import ModelConfig, check, positive
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM, LINEARS
from glm_core.model.initial import normal_draw
from glm_core.model.prefix import Prefix, values_width


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Which adapters are added to the base, and their sizes."""

    kind: Literal["lora", "ptuning"] = "lora"
    rank: int = 8
    """R"""
    alpha: float = 16.0
    """LoRA's product is multiplied by alpha / R"""
    targets: str = "attention.qkv attention.out"
    """the linear layers of every block that get a LoRA: any of attention.qkv, attention.out,
    mlp.up, mlp.down"""
    dropout: float = 0.0
    """share of a LoRA's inputs, or of the prefix's values, that is zeroed in training (ChatGLM's
    prefixes: 0.1)"""
    prefix_length: int = 128
    """P; ptuning only"""
    prefix_projection: bool = False
    """the prefix is computed from a table by two linear layers, instead of being the table"""
    prefix_width: int = 0
    """width of that table; 0 = as published: the model's width (ChatGLM-6B), or with grouped heads
    the width of all keys and values of a token (ChatGLM2 and 3)"""

    def __post_init__(self) -> None:
        odd = sorted(set(self.targets.split()) - set(LINEARS))
        check(
            self,
            positive("rank alpha prefix_length"),
            {
                "targets": (bool(self.targets.split()) and not odd)
                or f"must be one or more of {' '.join(LINEARS)}",
                "dropout": 0 <= self.dropout < 1 or "must lie in 0 ... 1, 1 excluded",
                "prefix_projection": not self.prefix_projection
                or self.kind == "ptuning"
                or "belongs to ptuning; use kind=ptuning or leave it out",
                "prefix_width": self.prefix_width == 0
                or (self.prefix_width > 0 and self.prefix_projection)
                or "must be positive, and needs prefix_projection",
            },
        )

    def table_width(self, model: ModelConfig) -> int:
        """Returns the width of the table that is projected, or 0 without a projection."""
        if not self.prefix_projection:
            return 0
        grouped = model.num_kv_heads < model.num_heads
        return self.prefix_width or (values_width(model) if grouped else model.hidden)


class LoRA(nn.Module):
    """y = base(x) + (alpha / R) dropout(x) A^T B^T, with A [R, D] and B [F, R], B zero at first.
    Source: Hu et al. 2021, eq. 3; appendix D for dropout."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], config: AdapterConfig) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.lora_a = nn.Parameter(torch.empty(config.rank, shape[1]))
        self.lora_b = nn.Parameter(torch.zeros(shape[0], config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., D] to [..., F]."""
        fed = nn.functional.dropout(x, self.dropout) if self.dropout and self.training else x
        low = ops.linear(fed, self.lora_a)  # [..., R]
        return self.base(x) + self.scale * ops.linear(low, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Adds the product to the base's weight, formed in float32 and rounded once, and returns
        the base."""
        weight = getattr(self.base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ConfigError(
                "merge: a LoRA cannot be added to a quantized weight; dequantize the base first"
            )
        product = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight.copy_(weight.float() + product)
        return self.base


def attach(model: GLM, config: AdapterConfig, seed: int = 0) -> GLM:
    """Freezes the model and puts adapters into it, in place. Their initial values depend on the
    seed and their names alone. A new LoRA does not change what the model computes. Dropout acts in
    `train` mode only."""
    if adapter_state(model):
        raise ConfigError("adapters: the model has some already; merge them or load the base again")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.kind == "ptuning":
        _attach_prefix(model, config, seed)
    else:
        _attach_lora(model, config, seed)
    return model


def _attach_prefix(model: GLM, config: AdapterConfig, seed: int) -> None:
    """Adds a prefix. With a projection, table and linear layers start with the variances of torch's
    own Embedding and Linear, as ChatGLM's do."""
    if model.config.kv_latent:
        raise ConfigError("adapters: a prefix needs keys and values; with latents use kind=lora")
    width = config.table_width(model.config)
    prefix = Prefix(model.config, config.prefix_length, width, config.dropout)
    for name, parameter in prefix.named_parameters():
        std = model.config.init_std if not width else 1.0
        if name != "table":
            std = 0.0 if parameter.ndim == 1 else 1 / math.sqrt(3 * parameter.shape[1])
        parameter.data.copy_(normal_draw(seed, f"prefix.{name}", parameter.shape) * std)
    model.prefix = prefix.to(model.embedding.device, model.embedding.dtype)
    model.register_forward_pre_hook(prefix.insert, with_kwargs=True)


def _attach_lora(model: GLM, config: AdapterConfig, seed: int) -> None:
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in GLM(model.config).named_parameters()}
    for target in config.targets.split():
        names = [f"blocks.{i}.{target}" for i in range(model.config.num_layers)]
        names = [n for n in names if f"{n}.weight" in shapes]
        if not names:
            raise ConfigError(
                f"adapters: no layer of the model has {target}; choose another target"
            )
        for name in names:
            rows, columns = shapes[f"{name}.weight"]
            base = model.get_submodule(name)
            lora = LoRA(base, (rows, columns), config)
            std = 1 / math.sqrt(columns)
            lora.lora_a.data.copy_(normal_draw(seed, f"{name}.lora_a", lora.lora_a.shape) * std)
            _replace(model, name, lora.to(model.embedding.device, model.embedding.dtype))


def _replace(model: GLM, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _modules(model: GLM) -> dict[str, LoRA]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}


def adapter_state(model: GLM) -> dict[str, Tensor]:
    """Returns the adapters' parameters by name."""
    prefix = getattr(model, "prefix", None)
    if prefix is not None:
        return {f"prefix.{name}": p for name, p in prefix.named_parameters()}
    return {
        f"{name}.{leaf}": getattr(lora, leaf)
        for name, lora in _modules(model).items()
        for leaf in ("lora_a", "lora_b")
    }


def merge(model: GLM) -> GLM:
    """Adds every LoRA to its base weight and removes it, in place. Raises ConfigError if the base
    is quantized, or if the adapter is a prefix."""
    if hasattr(model, "prefix"):
        raise ConfigError("merge: a prefix is part of no weight; keep it in a file of its own")
    for name, lora in _modules(model).items():
        _replace(model, name, lora.merged())
    return model
