"""Decides when the gradients of a backward are reduced over the data-parallel ranks: after it, at
the end of `coalesce_grad_reduction`, or at `step`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from glm_core.deepspeed.accelerator import get_accelerator
from glm_core.deepspeed.settings import Settings
from glm_core.distributed.placement import MasterStore
from glm_core.errors import TrainingError
from glm_core.training.loss_scale import LossScale


class MisplacedCall(TrainingError, AssertionError):
    """A call that is not allowed here; an AssertionError, as in DeepSpeed."""


class UnscaledBackward(TrainingError, RuntimeError):
    """A backward without the loss scale that the run needs; a RuntimeError, as in DeepSpeed."""


class UnusedParameter(TrainingError, AssertionError):
    """A parameter without gradient where the config wants one of each; an AssertionError, as in
    DeepSpeed."""


class Reduction:
    """The part of the engine that counts micro-batches and reduces gradients."""

    settings: Settings
    module: nn.Module
    stores: list[MasterStore]
    scaler: LossScale
    micro_steps: int
    names: dict[nn.Parameter, str]
    dp_group: dist.ProcessGroup

    def _start_reduction(self) -> None:
        self._boundary: bool | None = None
        self._block = ""
        """the call whose `with` block is open, if any"""
        self._reduced = False
        """the masters have the gradients of every backward so far"""
        self._reduces_itself = True
        self._own_backward = self._queued = self._scaled = False
        self._backwards = 0
        """since the last update"""
        self._set_sync(self.settings.managed)
        self._used: set[nn.Parameter] = set()
        """got a gradient since the last update; empty unless settings.all_used"""
        if self.settings.all_used:
            for param in (p for store in self.stores for p in store.params):
                param.register_post_accumulate_grad_hook(self._used.add)

    def _set_sync(self, sync: bool) -> None:
        for store in self.stores:
            store.sync = sync and self.settings.managed and self._reduces_itself

    @property
    def enable_backward_allreduce(self) -> bool:
        """Does a backward reduce? A script may set it to False and call `allreduce_gradients`
        itself; ZeRO 3 reduces anyway."""
        return self._reduces_itself

    @enable_backward_allreduce.setter
    def enable_backward_allreduce(self, enabled: bool) -> None:
        self._reduces_itself = enabled
        self._set_sync(not self._block)

    # --- after a backward ---

    def _backward_done(self) -> None:
        self._backwards += 1
        waits = bool(self._block) and self.settings.stage < 3
        if waits or not self.settings.managed or not self._reduces_itself:
            for store in self.stores:
                store.backward_done(last=False)
            self._reduced = self.settings.stage == 3
        else:
            self._reduce(self.is_gradient_accumulation_boundary())

    def _reduce(self, last: bool) -> None:
        for store in self.stores:
            store.backward_done(last)
        self._reduced = True

    def _watch(self, outputs: Any) -> Any:
        """Makes `loss.backward()` of the module's outputs end as `engine.backward(loss)` does."""
        if torch._C._are_functorch_transforms_active():
            return outputs  # torch.func.grad is no backward of the run's
        leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        computed = [t for t in leaves if t.grad_fn is not None]  # not a parameter itself
        self._num_outputs = len(computed)
        for tensor in computed:
            tensor.register_hook(self._plain_backward)
        return outputs

    @contextmanager
    def _calls_backward(self) -> Iterator[None]:
        """Marks a backward that the engine itself begins, and ends itself."""
        self._own_backward = True
        try:
            yield
        finally:
            self._own_backward = False

    def _plain_backward(self, grad: Tensor) -> Tensor | None:
        """Divides the gradient by the accumulation steps where the script called backward itself,
        and asks autograd to call `_plain_backward_done` at its end."""
        if self._own_backward:
            return None
        steps = self.settings.accumulation
        if steps > 1 and self._num_outputs > 1:
            raise MisplacedCall(
                "loss.backward(): the model has several outputs, so which gradient to divide by "
                f"gradient_accumulation_steps={steps} is not known; call engine.backward(loss)"
            )
        if self.scaler.scale != 1 and not self._scaled:
            raise UnscaledBackward(
                "loss.backward(): Loss scaling is required, and the loss is not scaled; call "
                "engine.backward(loss) or engine.scale(loss).backward()"
            )
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(  # as FSDP2 does
                self._plain_backward_done
            )
        return grad / steps if steps > 1 else None

    def _plain_backward_done(self) -> None:
        self._queued = self._scaled = False
        self._backward_done()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss times the loss scale, for a `backward()` that the script calls."""
        if loss.numel() != 1:
            raise MisplacedCall(
                f"engine.scale: takes a scalar tensor, received shape {tuple(loss.shape)}; reduce "
                "the loss to a number"
            )
        self._scaled = True
        return loss.float() * self.scaler.scale

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Reduces the gradients that `backward` left unreduced. bucket_size: has no effect, the
        config's reduce_bucket_size decides."""
        if not self._reduced:
            self._reduce(self.is_gradient_accumulation_boundary())

    # --- the accumulation's end ---

    def managed_gradient_accumulation(self) -> bool:
        """Does the engine count micro-batches? If not, every `step` is an update."""
        return self.settings.managed

    def is_gradient_accumulation_boundary(self) -> bool:
        """Does this micro-batch end with an update?"""
        if self._boundary is not None:
            return self._boundary
        if not self.settings.managed:
            return False
        return (self.micro_steps + 1) % self.settings.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decides from now on whether micro-batches end with an update, in place of their count."""
        if not self.settings.managed:
            raise MisplacedCall(
                "set_gradient_accumulation_boundary() is not supported with "
                "managed_gradient_accumulation=False; call step() where an update is due"
            )
        self._boundary = is_boundary

    def _ends_accumulation(self) -> bool:
        """Checks that `step` may be called, and returns whether it is an update."""
        if self._block:
            raise MisplacedCall(
                f"engine.step: It is illegal to call Engine.step() inside {self._block}; call it "
                "after the block"
            )
        if not self._backwards:
            raise TrainingError(
                "engine.step: no backward before it; call engine.backward(loss), or loss.backward()"
                " on an output of engine(...)"
            )
        if not self.settings.managed and not self._reduced:
            self._reduce(last=True)
        if not self._reduced:
            raise TrainingError(
                "engine.step: the gradients are not reduced over the ranks; end with a backward "
                "outside no_sync, or call engine.allreduce_gradients()"
            )
        ends = not self.settings.managed or self.is_gradient_accumulation_boundary()
        if ends and self.settings.all_used:
            self._check_use()
        return ends

    def _check_use(self) -> None:
        """Raises UnusedParameter on all ranks if a parameter got no gradient on one of them."""
        every = [p for store in self.stores for p in store.params]
        unused = [self.names[p] for p in every if p not in self._used]
        self._used.clear()
        lacking = torch.tensor(len(unused), device=every[0].device)
        dist.all_reduce(lacking, dist.ReduceOp.MAX, self.dp_group)
        if lacking:
            raise UnusedParameter(
                f"engine.step: no gradient for {', '.join(unused) or 'a parameter of other ranks'}"
                "; use it in the loss, or remove zero_optimization.ignore_unused_parameters=false"
            )

    # --- blocks ---

    @property
    def inside_no_sync_ctxt(self) -> bool:
        """Is a block of `no_sync` or `coalesce_grad_reduction` open?"""
        return bool(self._block)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Makes backwards inside the block only accumulate on this rank; the next one after it
        reduces the sum. ZeRO 0 and 1 only, as in DeepSpeed."""
        if self.settings.stage > 1:
            raise MisplacedCall(
                "engine.no_sync: no_sync context manager is incompatible with gradient "
                f"partitioning logic of ZeRO stage {self.settings.stage}; use "
                "engine.coalesce_grad_reduction"
            )
        with self._open_block("no_sync context manager"):
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Reduces the gradients of all backwards inside the block at its end, for one `step` after
        it. ZeRO 1 to 3. In ZeRO 3 every backward reduces: the sum is the same, and no rank holds a
        whole gradient."""
        if not self.settings.managed:
            raise MisplacedCall(
                "coalesce_grad_reduction is not supported with managed_gradient_accumulation=False;"
                " step() reduces once anyway"
            )
        if self.settings.stage == 0:
            raise NotImplementedError(
                "engine.coalesce_grad_reduction: requires ZeRO stage 1/2/3; use no_sync in ZeRO 0"
            )
        with self._open_block("coalesce_grad_reduction"):
            yield
        if self._backwards and self.settings.stage < 3:
            self._reduce(last=True)

    @contextmanager
    def _open_block(self, name: str) -> Iterator[None]:
        if self._block:
            raise MisplacedCall(
                f"engine: {name} reentry is unsupported; it cannot be nested inside another "
                f"no_sync context ({self._block} is open)"
            )
        self._block = name
        self._set_sync(False)
        try:
            yield
        finally:
            self._block = ""
            self._set_sync(True)

    def empty_partition_cache(self) -> None:
        """Frees the whole parameters that ZeRO 3 has gathered, and torch's cached memory."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        get_accelerator().empty_cache()
