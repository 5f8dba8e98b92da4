"""Moves a running engine's state into a checkpoint and back: whole weights, and this rank's spans
of the masters and of the optimizer's state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glm_core.deepspeed.checkpoint.own_layout import SavedSpan
from glm_core.distributed.fsdp import whole
from glm_core.distributed.placement import MasterStore, Span, flat
from glm_core.errors import CheckpointError


def whole_weights(module: nn.Module, round_to: torch.dtype | None) -> dict[str, Any]:
    """Returns the module's state dict with whole tensors on the CPU; floating-point ones in
    `round_to`, if given. Names of one parameter have the same tensor. A collective where the module
    holds DTensors."""
    state: dict[str, Any] = {}
    names: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if (first := names.setdefault(id(value), name)) != name:
            state[name] = state[first]
            continue
        values = whole(value) if isinstance(value, DTensor) else value
        if round_to is not None and values.is_floating_point():
            values = values.to(round_to)
        state[name] = values.detach().cpu()
    return state


@dataclasses.dataclass(frozen=True, slots=True)
class OptimizerShard:
    """This rank's masters and optimizer state, by the names that checkpoints use."""

    stores: list[MasterStore]
    """one per parameter group of the optimizer"""
    optimizer: torch.optim.Optimizer | None
    names: dict[nn.Parameter, str]

    def spans(self) -> list[SavedSpan]:
        """Returns the elements that this rank saves: their masters, the optimizer's state of the
        same shape, and the state's scalars as they are."""
        assert self.optimizer is not None or not self.stores
        saved: list[SavedSpan] = []
        for span in (s for store in self.stores for s in store.spans()):
            values: dict[str, Any] = {"fp32": flat(span.master)[span.of_master].cpu().clone()}
            assert self.optimizer is not None
            for key, value in self.optimizer.state.get(span.master, {}).items():
                if isinstance(value, Tensor) and value.shape == span.master.shape:
                    values[key] = flat(value)[span.of_master].cpu().clone()
                else:
                    values[key] = value
            saved.append({"name": self.names[span.param], "start": span.start, "values": values})
        return saved

    def groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's parameter groups with names in place of parameters."""
        if self.optimizer is None:
            return []
        return [
            {**group, "params": [self.names[p] for p in store.params]}
            for store, group in zip(self.stores, self.optimizer.param_groups, strict=True)
        ]

    @torch.no_grad()
    def restore(
        self, state: dict[str, dict[str, Any]], groups: list[dict[str, Any]] | None
    ) -> None:
        """Sets the masters from a checkpoint's state, and the weights from the masters. Unless
        `groups` is None it sets the optimizer's moments and groups too."""
        for store in self.stores:
            for span in store.spans(every_rank=True):
                for key, value in state.get(self.names[span.param], {}).items():
                    if key == "fp32":
                        span.copy_from(value, flat(span.master))
                    elif groups is not None:
                        self._restore_moment(span, key, value)
            store.publish()
        if self.optimizer is not None and groups is not None:
            for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
                group.update({k: v for k, v in saved.items() if k != "params"})

    def _restore_moment(self, span: Span, key: str, value: Any) -> None:
        assert self.optimizer is not None
        state = self.optimizer.state[span.master]
        if isinstance(value, Tensor) and value.ndim and value.numel() == span.param.numel():
            if key not in state:
                state[key] = torch.zeros_like(span.master, dtype=value.dtype)
            span.copy_from(value, flat(state[key]))
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value

    @torch.no_grad()
    def set_zero3_weights(
        self, module: nn.Module, weights: dict[str, Tensor], *, strict: bool
    ) -> None:
        """Sets a ZeRO 3 module's weights, which are its masters, and its plain tensors from whole
        ones. Raises CheckpointError where `strict` and the names differ."""
        own = module.state_dict()
        if strict and (odd := sorted(own.keys() ^ weights.keys())):
            raise CheckpointError(
                f"checkpoint: does not fit this model; only one of them has {', '.join(odd[:5])}"
            )
        for name, target in own.items():
            if name in weights and isinstance(target, DTensor):
                rows = distribute_tensor(
                    weights[name].detach().to(target.device_mesh.device_type, target.dtype),
                    target.device_mesh,
                    target.placements,
                    src_data_rank=None,
                )
                target.to_local().copy_(rows.to_local())
            elif name in weights:
                target.copy_(weights[name])
