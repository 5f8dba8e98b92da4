"""Separates the parameters of experts, which a script marks, from those that all ranks share
(`deepspeed.moe.utils`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_moe_param(param: Tensor) -> bool:
    """Is it a parameter of an expert? Such parameters have `allreduce` = False."""
    return not getattr(param, "allreduce", True)


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Is it an optimizer group of experts' parameters?"""
    return bool(param_group.get("moe", False))


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Returns (False, 0): DeepSpeed's MoE layer is not available here."""
    return False, 0


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters that all ranks share, and those of experts."""
    every = list(params)
    return [p for p in every if not is_moe_param(p)], [p for p in every if is_moe_param(p)]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: float | None = 178_956_971,
) -> list[dict[str, Any]]:
    """Returns the optimizer groups without experts' parameters, followed by groups of these: for
    each given group one per expert group (`param.group_name`), with the same options, `moe` = True
    and at most max_group_size elements (or one parameter). The given dicts are changed."""
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    if not isinstance(param_groups, list | tuple):
        raise ValueError(f"param_groups: received {type(param_groups).__name__}; give dicts")
    groups = list(param_groups)
    experts: list[dict[str, Any]] = []
    for group in groups:
        by_name: dict[str, list[nn.Parameter]] = {}
        shared, own = split_params_into_shared_and_expert_params(group["params"])
        for p in own:
            by_name.setdefault(p.group_name, []).append(p)  # type: ignore[attr-defined]  # the script's mark
        group["params"] = shared
        for name, params in by_name.items():
            for part in _parts(params, max_group_size):
                experts.append({**group, "name": name, "moe": True, "params": part})
    return groups + experts


def _parts(params: list[nn.Parameter], most: float | None) -> list[list[nn.Parameter]]:
    """Cuts a list into lists of at most `most` elements together (None: any number)."""
    parts: list[list[nn.Parameter]] = []
    size = 0.0
    for p in params:
        if not parts or (most is not None and size + p.numel() > most):
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts


def configure_moe_param_groups(model_parameters: list[Any]) -> list[Any]:
    """Returns optimizer groups that separate experts' parameters, of parameters or of groups."""
    if isinstance(model_parameters[0], nn.Parameter):
        group = {"params": model_parameters, "name": "dense-params"}
        return split_params_into_different_moe_groups_for_optimizer(group)
    if any("moe" in group for group in model_parameters):
        return model_parameters
    return split_params_into_different_moe_groups_for_optimizer(model_parameters)
