"""Accepts the calls of `deepspeed.utils.z3_leaf_module`, which have no effect here."""

from __future__ import annotations

from typing import Any

from torch import nn

from glm_core.deepspeed.notices import say_once


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: list[Any]) -> list[nn.Module]:
    """Returns the modules of these classes. It changes nothing else: FSDP2 already gathers each
    layer of a ModuleList as a whole."""
    say_once("set_z3_leaf_modules has no effect: whole layers are gathered at once anyway")
    kinds = tuple(k for k in leaf_module_classes if isinstance(k, type))
    return [m for m in model.modules() if isinstance(m, kinds)]
