"""Plants the mistakes of a training loop on one process, and of resuming a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from glm_core.faults.kernels import pulled
from glm_core.faults.museum.exhibit import GITHUB, Exhibit
from glm_core.model import rotary
from glm_core.model.glm import GLM
from glm_core.training.optimizer import Optimizer
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer

Context = AbstractContextManager[Any]


def wrapped(owner: Any, name: str, wrong: Callable[..., Any]) -> Context:
    """Replaces a function by `wrong`, which is called with the right one first."""
    right = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *a, **k: wrong(right, *a, **k))


# gradients ----------------------------------------------------------------------------


def equal_micro_batches() -> Context:
    """Gives every micro-batch the same weight, whatever it holds."""

    def wrong(right: Any, self: Trainer, batches: list[Any]) -> Any:
        total = sum(float(b.loss_weight.sum()) for b in batches)
        equal = [
            dataclasses.replace(
                b, loss_weight=b.loss_weight * (total / len(batches) / float(b.loss_weight.sum()))
            )
            for b in batches
        ]
        return right(self, equal)

    return wrapped(Trainer, "backward", wrong)


def summed_micro_batches() -> Context:
    """Multiplies the gradients by the number of micro-batches; the loss stays right."""

    def wrong(right: Any, self: Trainer, batches: list[Any]) -> Any:
        loss = right(self, batches)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad *= len(batches)
        return loss

    return wrapped(Trainer, "backward", wrong)


def last_micro_batch_only() -> Context:
    """Clears the gradients before every micro-batch; the loss stays right."""

    def wrong(right: Any, self: SingleProcess, *args: Any) -> Any:
        self.model.zero_grad(set_to_none=True)
        return right(self, *args)

    return wrapped(SingleProcess, "forward_backward", wrong)


def stale_gradient_buffer() -> Context:
    """Adds the gradients to what their buffer held: the parameters it received."""

    def wrong(right: Any, self: Trainer, batches: list[Any]) -> Any:
        loss = right(self, batches)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad += p.detach()
        return loss

    return wrapped(Trainer, "backward", wrong)


def shared_head(change: Callable[[Tensor], Tensor]) -> Context:
    """Passes a tied embedding through `change` where it serves as the head."""

    def weight(self: GLM) -> Tensor:
        return change(self.embedding) if self.head is None else self.head

    return mock.patch.object(GLM, "head_weight", property(weight))


def low_frequencies() -> Context:
    """Rounds the rotation's frequencies to bfloat16 before positions multiply them."""
    return wrapped(rotary, "frequencies", lambda right, *a: right(*a).bfloat16().float())


# the update ---------------------------------------------------------------------------


def vectors_decay() -> Context:
    """Lets norms and biases decay as matrices do."""

    def wrong(right: Any, self: Optimizer, *args: Any) -> None:
        right(self, *args)
        self.groups = (list(self.master), [])

    return wrapped(Optimizer, "__init__", wrong)


def low_masters() -> Context:
    """Keeps the optimizer's weights in bfloat16."""

    def wrong(right: Any, self: Optimizer, *args: Any) -> Any:
        norm = right(self, *args)
        for w in self.master.values():
            w.copy_(w.bfloat16())
        return norm

    return wrapped(Optimizer, "step", wrong)


def clipped_before_unscaling() -> Context:
    """Compares the scaled gradients' norm with the limit."""

    def wrong(right: Any, self: Optimizer, lr: float, loss_scale: float = 1.0) -> Any:
        config = self.config
        self.config = dataclasses.replace(config, clip=config.clip / loss_scale)
        try:
            return right(self, lr, loss_scale)
        finally:
            self.config = config

    return wrapped(Optimizer, "step", wrong)


def unscaled_twice() -> Context:
    """Divides the gradients by the loss scale twice."""

    def wrong(right: Any, self: Optimizer, lr: float, loss_scale: float = 1.0) -> Any:
        return right(self, lr, loss_scale**2)

    return wrapped(Optimizer, "step", wrong)


# resuming -----------------------------------------------------------------------------


def after_restore(forget: Callable[[Trainer, dict[str, Any]], None]) -> Context:
    """Lets `forget` undo a part of every restore; it is given the sampler's state before."""

    def wrong(right: Any, self: Trainer, saved: Any) -> None:
        data = self.sampler.state()
        right(self, saved)
        forget(self, data)

    return wrapped(Trainer, "restore", wrong)


def without_moments(trainer: Trainer, data: dict[str, Any]) -> None:
    for moments in (trainer.optimizer.exp_avg, trainer.optimizer.exp_avg_sq):
        for m in moments.values():
            m.zero_()


def without_step_count(trainer: Trainer, data: dict[str, Any]) -> None:
    trainer.optimizer.step_count = 0


def without_random_state() -> Context:
    """Leaves the random numbers where the new process has them."""
    return mock.patch.object(SingleProcess, "restore_random_state")


# the exhibits -------------------------------------------------------------------------


def training(name: str, plant: Any, where: str, report: str, did: str, **rest: Any) -> Exhibit:
    """Returns an exhibit of a training loop; the other arguments are its fields."""
    fields: dict[str, Any] = {"part": "training", **rest}
    return Exhibit(name=name, plant=plant, where=where, report=GITHUB + report, did=did, **fields)


TRAINING = [
    training(
        "loss-averaged-per-micro-batch",
        equal_micro_batches,
        "every gradient",
        "huggingface/blog/pull/2414",
        "each micro-batch's mean counted alike, whatever its number of tokens (2024)",
        shown="loss",
    ),
    training(
        "gradients-summed-over-micro-batches",
        summed_micro_batches,
        "every gradient",
        "deepspeedai/DeepSpeed/issues/7773",
        "gradients of micro-batches were summed, not averaged; their norm was four times too large",
        shown="norm",
    ),
    training(
        "gradients-cleared-between-micro-batches",
        last_micro_batch_only,
        "every gradient",
        "NVIDIA-NeMo/Automodel/pull/3530",
        "only the last micro-batch trained the model; the loss looked fine",
        shown="norm",
    ),
    training(
        "gradients-added-to-a-stale-buffer",
        stale_gradient_buffer,
        "every gradient",
        "NVIDIA/Megatron-LM/pull/4609",
        "gradients were added to a buffer that still held gathered parameters",
        shown="loss",
    ),
    training(
        "tied-head-without-gradient",
        lambda: shared_head(torch.Tensor.detach),
        "gradient of embedding",
        "paiml/entrenar/issues/314",
        "a tied embedding never received the head's gradient; perplexity was 115, not 50",
        shown="loss",
    ),
    training(
        "tied-gradient-counted-twice",
        lambda: shared_head(lambda w: pulled(w, lambda g: 2 * g)),
        "gradient of embedding",
        "NVIDIA/TransformerEngine/pull/545",
        "garbage was added to a tied weight's gradient; planted as the head's share counted twice",
    ),
    training(
        "rotary-frequencies-in-bfloat16",
        low_frequencies,
        "every gradient",
        "sgl-project/sglang-jax/issues/1472",
        "frequencies were rounded to bfloat16 before positions multiplied them",
    ),
    training(
        "decay-of-norms-and-biases",
        vectors_decay,
        "update",
        "ServiceNow/Fast-LLM/issues/542",
        "after a refactoring norms and biases decayed too",
    ),
    training(
        "masters-in-bfloat16",
        low_masters,
        "update",
        "vllm-project/speculators/pull/765",
        "without float32 masters updates were lost; norm weights stayed at exactly 1",
        dtype="bfloat16",
    ),
    training(
        "clipped-before-unscaling",
        clipped_before_unscaling,
        "update",
        "milesial/Pytorch-UNet/issues/468",
        "the norm of the scaled gradients was compared with the clipping limit",
        dtype="float16",
    ),
    training(
        "gradients-unscaled-twice",
        unscaled_twice,
        "update",
        "redai-studio/Relax/pull/44",
        "gradients were divided by the loss scale twice",
        dtype="float16",
    ),
    training(
        "data-from-the-beginning-after-resume",
        lambda: after_restore(lambda trainer, data: trainer.sampler.restore(data)),
        "sampler",
        "kyutai-labs/pocket-tts/pull/287",
        "every restart drew the same data from the beginning",
        part="resume",
    ),
    training(
        "moments-lost-on-resume",
        lambda: after_restore(without_moments),
        "exp_avg*",
        "KempnerInstitute/KempnerForge/pull/115",
        "Adam's moments were zero after every resume",
        part="resume",
    ),
    training(
        "step-count-lost-on-resume",
        lambda: after_restore(without_step_count),
        "optimizer_steps",
        "EvolvingLMMs-Lab/OneVision-Encoder/pull/65",
        "the optimizer's state, with the step count of bias correction, was not saved",
        part="resume",
        shown="loss",
    ),
    training(
        "dropout-seed-after-resume",
        without_random_state,
        "rng.torch",
        "AI-Hypercomputer/maxtext/pull/4343",
        "every restart began dropout's random numbers anew",
        part="resume",
    ),
]
