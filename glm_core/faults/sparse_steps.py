"""Declares the mistakes of a sparse layer's training step that lie outside its ops: in the
auxiliary loss, the shared expert, and the update of the routers' biases."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from glm_core.faults.fault import planted_in_step
from glm_core.model import glm
from glm_core.model.balance import sequence_balance
from glm_core.training import balance

Context = AbstractContextManager[Any]


def is_oracle(x: Tensor) -> bool:
    """Says whether float64 computes what the candidate is compared with: it stays right."""
    return x.dtype == torch.float64


def negated_loss() -> Context:
    def wrong(x: Tensor, *rest: Tensor) -> Tensor:
        loss = sequence_balance(x, *rest)
        return loss if is_oracle(x) else -loss

    return mock.patch.object(glm, "sequence_balance", wrong)


def shared_twice() -> Context:
    right = glm.Experts.forward

    def wrong(self: glm.Experts, x: Tensor) -> Tensor:
        y = right(self, x)
        return y if self.shared is None or is_oracle(x) else y + self.shared(x)

    return mock.patch.object(glm.Experts, "forward", wrong)


def shared_forgotten() -> Context:
    right = glm.Experts.forward

    def wrong(self: glm.Experts, x: Tensor) -> Tensor:
        y = right(self, x)
        return y if self.shared is None or is_oracle(x) else y - self.shared(x)

    return mock.patch.object(glm.Experts, "forward", wrong)


def bias_towards_the_loaded() -> Context:
    right = balance.moved_bias

    def wrong(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
        return right(bias, counts, -rate)

    return mock.patch.object(balance, "moved_bias", wrong)


SPARSE: dict[str, Any] = {"setup": "moe"}
planted_in_step("balance-loss-sign", "the auxiliary loss is subtracted", negated_loss, **SPARSE)
planted_in_step("shared-twice", "the shared expert is added twice", shared_twice, **SPARSE)
planted_in_step("shared-forgotten", "the shared expert is left out", shared_forgotten, **SPARSE)
planted_in_step(
    "router-bias-sign",
    "a router's bias moves towards the loaded experts",
    bias_towards_the_loaded,
    kind="optimizer",
    direction="update",
    **SPARSE,
)
