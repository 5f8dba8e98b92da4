"""DeepSpeed's Adam classes, with torch's own update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.deepspeed.notices import say_once
from glm_core.errors import ConfigError
from glm_core.training.optimizer import own_part


class FusedAdam(torch.optim.Adam):
    """torch's Adam, or with adam_w_mode (the default) its AdamW."""

    on_host = False
    """parameters and gradients are in main memory: the host's AdamW kernel updates them"""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        """set_grad_none has no effect: gradients are always set to None. Raises ConfigError without
        bias_correction, which torch's Adam always does."""
        if not bias_correction:
            raise ConfigError(
                f"{type(self).__name__}: bias_correction=False is not supported; pass an optimizer "
                "of your own to initialize"
            )
        say_once(f"{type(self).__name__} uses torch.optim.Adam's update; results are the same")
        super().__init__(
            params,
            lr=lr,
            betas=(betas[0], betas[1]),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=adam_w_mode,
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, as torch's Adam does."""
        if not self.on_host or closure is not None or not all(map(_is_adamw, self.param_groups)):
            return super().step(closure)
        outer = dispatch.session()
        with torch.no_grad(), registry.use("cpu", outer.strict) as session:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        _update(p, p.grad, self.state[p], group)
        outer.fallbacks.update(session.fallbacks)
        return None


def _is_adamw(group: dict[str, Any]) -> bool:
    """Says whether the op `adamw` is what the group asks for."""
    decoupled = group["decoupled_weight_decay"] or not group["weight_decay"]
    return decoupled and not group["amsgrad"] and not group["maximize"]


def _update(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:  # as torch's Adam begins
        state["step"] = torch.zeros((), dtype=torch.float32)
        state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
    state["step"] += 1
    beta1, beta2 = group["betas"]
    ops.adamw(
        [own_part(p)],
        [own_part(grad)],
        [own_part(state["exp_avg"])],
        [own_part(state["exp_avg_sq"])],
        torch.ones(()),
        int(state["step"]),
        float(group["lr"]),
        float(beta1),
        float(beta2),
        group["eps"],
        group["weight_decay"],
    )


class DeepSpeedCPUAdam(FusedAdam):
    """FusedAdam wherever the masters are: in main memory with `offload_optimizer`."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        """See FusedAdam; some arguments have other names, as in DeepSpeed. Raises ConfigError for
        16-bit states."""
        if not fp32_optimizer_states:
            raise ConfigError(
                "DeepSpeedCPUAdam: states are float32; remove fp32_optimizer_states=False"
            )
        super().__init__(
            model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad
        )
