"""Fine-tuning that leaves the base alone: LoRA beside its linears, or a prefix (P-Tuning v2),
kept and saved apart.

Shapes: D in, F out, R rank."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import check, from_dict, positive, to_dict
from glm_core.errors import CheckpointError, ConfigError
from glm_core.model.glm import GLM, normal_draw
from glm_core.model.prefix import Prefix
from glm_core.model.weights.layouts import LINEARS

FORMAT = "glm-core adapter 1"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What is added to the base."""

    kind: Literal["lora", "ptuning"] = "lora"
    rank: int = 8
    """R"""
    alpha: float = 16.0
    """the product is multiplied by alpha / R"""
    targets: str = "attention.qkv attention.out"
    """linears of every block, out of attention.qkv, attention.out, mlp.up, mlp.down"""
    prefix_length: int = 128
    """P, of ptuning"""

    def __post_init__(self) -> None:
        odd = sorted(set(self.targets.split()) - set(LINEARS))
        check(
            self,
            positive("rank alpha prefix_length"),
            {
                "targets": (bool(self.targets.split()) and not odd)
                or f"must be one or more of {' '.join(LINEARS)}",
            },
        )


class LoRA(nn.Module):
    """y = base(x) + (alpha / R) x A^T B^T, B zero at first;  A [R, D], B [F, R]. Hu et al. 2021,
    eq. 3."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], config: AdapterConfig) -> None:
        super().__init__()
        self.base = base
        self.scale = config.alpha / config.rank
        self.lora_a = nn.Parameter(torch.empty(config.rank, shape[1]))
        self.lora_b = nn.Parameter(torch.zeros(shape[0], config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        low = ops.linear(x, self.lora_a)  # [..., R]
        return self.base(x) + self.scale * ops.linear(low, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with the product added to its weight, formed in float32, rounded once."""
        weight = getattr(self.base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ConfigError(
                "a quantized weight cannot take a LoRA in; load the base dequantized, then merge"
            )
        product = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight.copy_(weight.float() + product)
        return self.base


def attach(model: GLM, config: AdapterConfig, seed: int = 0) -> GLM:
    """Freezes the model and puts adapters into it, in place; their values depend on seed and name
    alone. With LoRA, what the model computes is unchanged until they are trained."""
    if adapter_state(model):
        raise ConfigError("the model has adapters already; merge them or load the base again")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.kind == "ptuning":
        _attach_prefix(model, config.prefix_length, seed)
    else:
        _attach_lora(model, config, seed)
    return model


def _attach_prefix(model: GLM, length: int, seed: int) -> None:
    prefix = Prefix(model.config, length)
    values = normal_draw(seed, "prefix.table", prefix.table.shape) * model.config.init_std
    prefix.table.data.copy_(values)
    model.prefix = prefix.to(model.embedding.device, model.embedding.dtype)
    model.register_forward_pre_hook(prefix.before, with_kwargs=True)


def _attach_lora(model: GLM, config: AdapterConfig, seed: int) -> None:
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in GLM(model.config).named_parameters()}
    for i in range(len(model.blocks)):
        for target in config.targets.split():
            name = f"blocks.{i}.{target}"
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
    """The adapters' parameters by name."""
    prefix = getattr(model, "prefix", None)
    if prefix is not None:
        return {"prefix.table": prefix.table}
    return {
        f"{name}.{leaf}": getattr(lora, leaf)
        for name, lora in _modules(model).items()
        for leaf in ("lora_a", "lora_b")
    }


def merge(model: GLM) -> GLM:
    """Adds every LoRA to its base weight and takes it out, in place. Raises ConfigError where the
    base is quantized, or the adapter is a prefix."""
    if hasattr(model, "prefix"):
        raise ConfigError("a prefix is no part of any weight; keep it beside the base")
    for name, lora in _modules(model).items():
        _replace(model, name, lora.merged())
    return model


def save_adapter(path: str | Path, model: GLM, config: AdapterConfig) -> None:
    """Writes the adapters alone, a safetensors file. Raises CheckpointError."""
    state = {n: t.detach().cpu().contiguous() for n, t in adapter_state(model).items()}
    header = {"format": FORMAT, "config": json.dumps(to_dict(config))}
    try:
        save_file(state, path, header)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not saved ({error}); make room, then repeat") from None


def load_adapter(path: str | Path, model: GLM) -> AdapterConfig:
    """Attaches saved adapters to a base. Raises CheckpointError for a file that is something else
    or fits another base, and leaves the model as it was."""
    config, state = _read(Path(path))
    with torch.device("meta"):
        sizes = adapter_state(attach(GLM(model.config), config))
    odd = [
        f"{n} is {list(state[n].shape) if n in state else 'missing'}, "
        f"expected {list(sizes[n].shape) if n in sizes else 'nothing'}"
        for n in sorted(state.keys() | sizes.keys())
        if n not in state or n not in sizes or state[n].shape != sizes[n].shape
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise CheckpointError(
            f"{path}: does not fit this base: {'; '.join(odd[:3])}{more}; load the base that it "
            "was trained on"
        )
    attach(model, config)
    with torch.no_grad():
        for name, parameter in adapter_state(model).items():
            parameter.copy_(state[name])
    return config


def _read(path: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not an adapter of ours; expected {FORMAT!r}")
        return from_dict(AdapterConfig, json.loads(header["config"])), state
    except (OSError, SafetensorError, ValueError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: truncated or not an adapter ({error})") from None
