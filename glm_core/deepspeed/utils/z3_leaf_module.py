"""Marks modules that ZeRO 3 gathers as one (`deepspeed.utils.z3_leaf_module`). It matters where the
ranks, or the steps, run different parts of a module, such as experts: gathered part by part, one
rank would wait for, or get, what another rank does not send."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from glm_core.deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from glm_core.deepspeed.settings import BadConfig
from glm_core.distributed.fsdp import default_blocks


def z3_leaf_module(model: nn.Module) -> bool:
    """Is the module marked?"""
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the marked modules inside a model."""
    return [m for m in model.modules() if z3_leaf_module(m)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Marks a module, or takes the mark away."""
    model._z3_leaf = flag  # type: ignore[assignment]  # no submodule


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks the modules of these classes, given as classes or by name (with or without the
    module's), and returns them. Raises ConfigError, a ValueError, where there is none."""
    kinds = list(leaf_module_classes)
    return _mark(model, kinds, lambda _, m: _is_of(m, kinds), True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the marks away that `set_z3_leaf_modules` would set."""
    kinds = list(leaf_module_classes)
    return _mark(model, kinds, lambda _, m: _is_of(m, kinds), False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: list[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks the modules of these names; returns them, and the names that no module has."""
    found = _mark(model, module_names, lambda n, _: n in module_names, flag, raise_if_not_found)
    there = {n for n, _ in model.named_modules()}
    return found, [n for n in module_names if n not in there]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Marks the modules whose names end so; returns them, and the suffixes that no name has."""
    ends = tuple(module_name_suffixes)
    found = _mark(
        model, ends, lambda n, _: bool(ends) and n.endswith(ends), flag, raise_if_not_found
    )
    names = [n for n, _ in model.named_modules()]
    return found, [end for end in ends if not any(n.endswith(end) for n in names)]


def _is_of(module: nn.Module, kinds: list[Any]) -> bool:
    names = {n for k in type(module).__mro__ for n in (k.__name__, f"{k.__module__}.{k.__name__}")}
    return any(k in names if isinstance(k, str) else isinstance(module, k) for k in kinds)


def _mark(
    model: nn.Module,
    wanted: Iterable[Any],
    chosen: Callable[[str, nn.Module], bool],
    flag: bool,
    must: bool,
) -> list[nn.Module]:
    found = [m for n, m in model.named_modules() if chosen(n, m)]
    if must and not found:
        raise BadConfig(f"z3_leaf_modules: the model has none of {list(wanted)}; correct the names")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def zero3_blocks(model: nn.Module, section: DeepSpeedZeroLeafModuleConfig) -> list[nn.Module]:
    """Marks the modules that the config names, and returns the blocks for `fsdp.shard_parameters`:
    the default ones, but a marked module is cut no further. Its parameters get a gradient of zero
    on a rank that does not use them, since otherwise ranks would sum different ones."""
    set_z3_leaf_modules(model, section.classes, raise_if_not_found=False)
    set_z3_leaf_modules_by_name(model, section.names, raise_if_not_found=False)
    set_z3_leaf_modules_by_suffix(model, section.name_suffixes, raise_if_not_found=False)
    leaves: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in get_z3_leaf_modules(model):
        if module not in inside:
            leaves.append(module)
            inside.update(module.modules())
            module.register_forward_hook(_use_all_parameters)
    return [b for b in default_blocks(model) if b in leaves or b not in inside]


def _use_all_parameters(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    params = [p for p in module.parameters() if p.requires_grad]

    def use(value: Any) -> Any:
        if not params or not isinstance(value, Tensor) or not value.requires_grad:
            return value
        used = _Using.apply(value, *params)  # type: ignore[no-untyped-call]  # torch's
        params.clear()
        return used

    return tree_map(use, outputs)


class _Using(torch.autograd.Function):
    """Returns a tensor as a result of the parameters too, with gradients of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *params: Tensor) -> Tensor:
        ctx.params = params
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros_like(p) for p in ctx.params)
