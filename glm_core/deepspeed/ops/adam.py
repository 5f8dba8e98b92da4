"""DeepSpeed's Adam classes, with torch's own update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from glm_core.deepspeed.notices import say_once
from glm_core.errors import ConfigError


class FusedAdam(torch.optim.Adam):
    """torch's Adam, or with adam_w_mode (the default) its AdamW."""

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


class DeepSpeedCPUAdam(FusedAdam):
    """FusedAdam on whatever device the weights are; nothing is offloaded here."""

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
