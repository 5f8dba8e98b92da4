"""Decides what a checkpoint holds, whichever layout, ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""the engine's counters that are saved"""


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """A checkpoint's content, merged over all ranks."""

    module: dict[str, Tensor]
    """whole weights and buffers by name"""
    state: dict[str, dict[str, Any]]
    """by parameter: `fp32` (its master) and the optimizer's moments, whole and flattened; scalars
    such as `step`"""
    groups: list[dict[str, Any]]
    """the optimizer's parameter groups; where `params` is there it holds names"""
    lr_scheduler: dict[str, Any] | None
    loss_scale: dict[str, Any]
    """the state of a dynamic loss scale; empty for none"""
    counters: dict[str, int]
    client: dict[str, Any]
    """the script's own `client_state`"""
