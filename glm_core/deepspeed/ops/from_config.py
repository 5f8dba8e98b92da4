"""Makes the optimizer that a config names, and decides in which ZeRO stages an optimizer is
right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from glm_core.deepspeed.ops import adam
from glm_core.deepspeed.ops.lamb import FusedLamb
from glm_core.deepspeed.ops.lion import FusedLion
from glm_core.errors import ConfigError

WHOLE: dict[str, tuple[int, ...]] = {
    "FusedLamb": (0, 3),
    "Muon": (0,),
    "Adafactor": (0,),
    "LBFGS": (),
}
"""optimizers that need whole parameters, and the ZeRO stages in which they see them whole"""
ABSENT = ("muon", "onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd")


def make(kind: str, params: dict[str, Any], groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Makes the optimizer that a config names. Raises ConfigError."""
    params, name = dict(params), kind.lower()
    if "max_grad_norm" in params:
        raise ConfigError("optimizer.params.max_grad_norm: is not read; set gradient_clipping")
    if name in ABSENT:
        raise ConfigError(
            f"optimizer.type={kind!r}: is not available here; pass your own as optimizer="
        )
    try:
        if name in ("adam", "adamw"):
            return _adam(name, params, groups)
        own = {"adagrad": torch.optim.Adagrad, "lamb": FusedLamb, "lion": FusedLion}
        optimizer = own.get(name) or getattr(torch.optim, kind, None)
        if optimizer is None:
            raise ConfigError(
                f"optimizer.type={kind!r}: not one of DeepSpeed's or torch.optim's; use AdamW, "
                "Adam, Adagrad, Lamb, Lion, SGD, or pass your own as optimizer="
            )
        result: torch.optim.Optimizer = optimizer(groups, **params)
        return result
    except TypeError as error:
        raise ConfigError(f"optimizer.params: {error}") from None


def _adam(name: str, params: dict[str, Any], groups: Iterable[Any]) -> torch.optim.Optimizer:
    decoupled = bool(params.pop("adam_w_mode", True)) or name == "adamw"
    if params.pop("torch_adam", False):
        # torch's class: its own defaults (AdamW decays by 0.01, FusedAdam does not)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **params)
    return adam.FusedAdam(groups, adam_w_mode=decoupled, **params)


def check_stage(
    optimizer: torch.optim.Optimizer, stage: int, *, low: bool, offload: bool = False
) -> None:
    """Raises ConfigError where the optimizer needs whole parameters and would see only parts of
    them. low: the weights are in 16 bit; offload: the optimizer is in main memory, where no
    rank sees more than its part."""
    name = type(optimizer).__name__
    stages = WHOLE.get(name)
    if stages is None or (stage in stages and not offload and not (low and stage == 0)):
        return
    where = " or ".join(f"{s}{' in float32' if s == 0 else ''}" for s in stages) or "none"
    raise ConfigError(
        f"{name}: needs whole parameters, which ZeRO {stage}{' in 16 bit' if low else ''}"
        f"{' with offload' if offload else ''} cuts; use a ZeRO stage that leaves them whole "
        f"({where}{', without offload' if offload else ''}), or an optimizer such as AdamW"
    )
