"""The optimizer of every run: clipped AdamW with float32 master weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import TrainConfig
from glm_core.versions import torch_has


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns a step's rate: linear warmup to `lr`, then cosine to `min_lr` at the last step. Steps
    are counted from 1."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def own_part(x: Tensor) -> Tensor:
    """Returns this process's part of a tensor that processes share out (DTensor), else x itself."""
    to_local: Callable[[], Tensor] | None = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


def sum_in_float32(model: nn.Module) -> None:
    """Makes the trained parameters' `.grad` float32: a sum over micro-batches in a lower precision
    forgets small summands."""
    for p in model.parameters():
        if not p.requires_grad or p.dtype == torch.float32:
            continue
        if torch_has("grad_dtype"):
            p.grad_dtype = torch.float32
        else:
            p.register_post_accumulate_grad_hook(_widen)


def _widen(p: Tensor) -> None:
    """Makes `.grad` float32, and torch adds what comes next to it as it is."""
    if p.grad is not None and p.grad.dtype != torch.float32:
        assign_gradient(p, p.grad.float())


def assign_gradient(p: Tensor, grad: Tensor | None) -> None:
    """Assigns `.grad`, of whatever dtype. Torch before 2.11 compares it with that of the values,
    but only here, so the values are of the gradient's for that moment."""
    if grad is None or torch_has("grad_dtype"):
        p.grad = grad
        return
    values, p.grad = p.data, None
    p.data = grad
    p.grad = grad
    p.data = values


class Optimizer:
    """AdamW (op `adamw`) with clipping by the global norm (op `global_norm`). Matrices decay,
    vectors do not, frozen parameters have no part in it. Below float32 the model's parameters are
    rounded copies of float32 masters held here. Where processes share parameters out, each has its
    own part here, and the norm must be given."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        norm: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> None:
        """norm: returns the norm of the whole gradient, given this process's part by parameter; by
        default the op `global_norm`."""
        self.config = config
        self.norm = norm or (lambda grads: ops.global_norm(list(grads.values())))
        self.step_count = 0
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.named = {n: own_part(p) for n, p in self.trained.items()}
        self.low_precision = any(p.dtype != torch.float32 for p in self.named.values())
        own = {name: p.detach() for name, p in self.named.items()}
        self.master = {n: p.float().clone() for n, p in own.items()} if self.low_precision else own
        self.low: dict[str, Tensor] = own if self.low_precision else {}
        """what an update rounds the masters to"""
        self._place()
        self.exp_avg = {n: torch.zeros_like(p) for n, p in self.master.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p) for n, p in self.master.items()}
        self.groups = (
            [n for n, p in self.master.items() if p.ndim > 1],
            [n for n, p in self.master.items() if p.ndim <= 1],
        )

    def _place(self) -> None:
        """Puts the masters and what they are rounded to where they are to stay: they do already."""

    def load_masters(self, values: dict[str, Tensor]) -> None:
        """Starts from these float32 weights; the model's own copies are rounded from them."""
        with torch.no_grad():
            for name, value in values.items():
                self.master[name].copy_(value)
                self.named[name].copy_(value)

    def step(self, lr: float, loss_scale: float = 1.0) -> Tensor:
        """One update from the parameters' `.grad`; returns the gradient norm before clipping, loss
        scale removed (float32 scalar on the device). A norm that is not finite leaves every weight
        untouched."""
        c = self.config
        grads = {n: own_part(p.grad) for n, p in self.trained.items() if p.grad is not None}
        norm = self.norm(grads) / loss_scale
        if not torch.isfinite(norm):
            return norm
        clip = torch.clamp(c.clip / (norm + 1e-6), max=1.0) if c.clip else torch.ones_like(norm)
        self.step_count += 1
        for names, decay in zip(self.groups, (c.weight_decay, 0.0), strict=True):
            names = [n for n in names if n in grads]
            if names:
                self._update(names, grads, clip / loss_scale, lr, decay)
        return norm

    @torch.no_grad()
    def _update(
        self, names: list[str], grads: dict[str, Tensor], scale: Tensor, lr: float, decay: float
    ) -> None:
        c = self.config

        def pick(table: dict[str, Tensor]) -> list[Tensor]:
            return [table[n] for n in names]

        low = [self.low[n] for n in names] if self.low else []
        # kernels round to the copies where these have the gradients' dtype
        fused = bool(low) and grads[names[0]].dtype == low[0].dtype
        ops.adamw(
            pick(self.master),
            pick(grads),
            pick(self.exp_avg),
            pick(self.exp_avg_sq),
            scale,
            self.step_count,
            lr,
            c.beta1,
            c.beta2,
            c.eps,
            decay,
            low if fused else None,
        )
        if low and not fused:
            torch._foreach_copy_(low, pick(self.master))

    def state(self) -> dict[str, Any]:
        """Returns everything a resumed run needs: tensors by `master.NAME`, `exp_avg.NAME`, ...,
        and the step count."""
        tables = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        tensors = {f"{t}.{n}": v for t, table in tables.items() for n, v in table.items()}
        return {"tensors": tensors, "step_count": self.step_count}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, into the tensors in place."""
        for key, mine in self.state()["tensors"].items():
            mine.copy_(state["tensors"][key])
        self.resume(state["step_count"])

    @torch.no_grad()
    def resume(self, step_count: int) -> None:
        """Goes on after `step_count` steps, when the tensors of `state` were filled in place: the
        model's copies follow the masters."""
        for name, p in self.named.items():
            p.copy_(self.master[name])
        self.step_count = step_count
