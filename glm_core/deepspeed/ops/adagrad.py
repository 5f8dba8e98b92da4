"""DeepSpeed's Adagrad class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from glm_core.errors import ConfigError


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """torch's Adagrad on whatever device the weights are; nothing is offloaded here."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        """States are float32. Raises ConfigError for amsgrad, which Adagrad does not have."""
        if amsgrad:
            raise ConfigError("DeepSpeedCPUAdagrad: Adagrad has no amsgrad; remove it")
        super().__init__(model_params, lr=lr, weight_decay=weight_decay, eps=eps)
