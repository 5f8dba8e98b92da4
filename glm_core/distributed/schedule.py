"""Orders the forwards and backwards of a step's micro-batches on one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from glm_core.config import ModelConfig
from glm_core.distributed.pipeline import Stage
from glm_core.distributed.plan import Plan, stages_of
from glm_core.versions import torch_has

META = torch.device("meta")


class Lean(PipelineStage):
    """A stage whose receive buffers have memory only from the receive to their last use, as torch's
    own from 2.15 on. Older ones hold one for every micro-batch of the step, from the first step on;
    here it lies on the meta device until a receive asks for it."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with _on_meta(self):
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with _on_meta(self):
            return super()._prepare_backward_infra(*args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> Any:
        # torch 2.9 greets its own rank too, and sends int64 where float32 is received: gloo refuses
        own = dist.get_rank()
        greetings = [g for g in super()._get_init_p2p_neighbors_ops() if g.peer != own]
        for greeting in greetings:
            greeting.tensor = greeting.tensor.float()
        return greetings

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _move_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _move_buffers(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _move_buffers(self.args_recv_info[fwd_chunk_id], META)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _move_buffers(self.grad_recv_info.get(bwd_chunk_id, ()), META)


@contextmanager
def _on_meta(stage: PipelineStage) -> Iterator[None]:
    """Lets the stage allocate on the meta device."""
    device, stage.device = stage.device, META
    try:
        yield
    finally:
        stage.device = device


def _move_buffers(recv_infos: Any, device: torch.device) -> None:
    """Gives each receive a new, empty buffer on this device, in place of the one it has."""
    for info in recv_infos:
        buffer = getattr(info, "buffer", None)  # the first stage's inputs are not received
        if buffer is not None:
            empty = torch.empty_like(buffer, device=device)
            info.buffer = empty.requires_grad_(buffer.requires_grad)


STAGE: type[PipelineStage] = PipelineStage if torch_has("lean_receive_buffers") else Lean


class Followed(STAGE):  # type: ignore[misc, valid-type]  # chosen by the version of torch
    """A stage that calls `followed` after the backward pass of each micro-batch."""

    followed: Callable[[], None] | None = None

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.followed is not None:
            self.followed()


class Unsynced(nn.Module):
    """Hides from torch's schedules that a stage is sharded. They let FSDP add up the gradients of
    all micro-batches and then reduce the sum; now it reduces those of each."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.stage(*args, **kwargs)


class FewMicroBatches(PipelineScheduleSingle):
    """A schedule that also takes fewer micro-batches than stages: torch's loops can, but its
    constructors refuse."""

    def __init__(self, stage: PipelineStage, n_microbatches: int, **options: Any) -> None:
        enough = (
            n_microbatches
            if torch_has("few_micro_batches")
            else max(n_microbatches, stage.num_stages)
        )
        PipelineScheduleSingle.__init__(self, stage, enough, **options)
        self._n_microbatches = n_microbatches


class GPipe(FewMicroBatches, ScheduleGPipe):
    pass


class OneForwardOneBackward(FewMicroBatches, Schedule1F1B):
    pass


class Batch(NamedTuple):
    """Messages under way, all of which are waited for."""

    messages: list[dist.Work]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()


def _batch_p2p(p2p_ops: list[dist.P2POp], desc: str | None = None) -> Batch | None:
    """Stands in for torch 2.7's function of this name, which keeps the last message alone: gloo
    then never sends the others."""
    return Batch(dist.batch_isend_irecv(p2p_ops)) if p2p_ops else None


if not torch_has("keeps_every_message"):
    schedules._batch_p2p = _batch_p2p  # type: ignore[assignment]  # a Batch waits as a Work does

SINGLE: dict[str, type[FewMicroBatches]] = {"gpipe": GPipe, "1f1b": OneForwardOneBackward}
MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Work:
    """Runs a process's stages over a step's micro-batches; gradients are summed, not averaged."""

    losses: list[Tensor]
    """of the latest run, of each micro-batch; empty where the last stage is not held"""

    def __init__(
        self,
        stages: list[Stage],
        plan: Plan,
        mesh: DeviceMesh,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        followed: Callable[[Stage], None] | None = None,
    ) -> None:
        """followed: is called after each micro-batch's backward pass through a stage, with the
        gradients in `.grad`; under ZeRO they are summed over the ranks by then."""
        self.followed = followed
        self.stages, self.plan, self.mesh = stages, plan, mesh
        self.config, self.device, self.dtype = config, device, dtype
        self.shape: tuple[int, int] = (0, 0)
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None

    def run(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Does forward and backward of this data-parallel rank's rows. Returns their loss where the
        last stage is held, and the auxiliary losses of the stages that are; a float32 scalar."""
        inputs = {"tokens": tokens, **inputs}
        if self.plan.pp == 1:
            return self._accumulate(tokens, inputs)
        rows, length = tokens.shape
        if self.schedule is None or self.shape != (rows, length):
            # the size of what travels is agreed once; a growing batch changes it
            self.shape = (rows, length)
            self.schedule = self._schedule(rows // self.plan.micro_batches, length)
        self.losses = []
        first = (tokens,) if any(s.is_first for s in self.stages) else ()
        options: Any = {"return_outputs": False} if torch_has("return_outputs") else {}
        self.schedule.step(*first, target=inputs["labels"], losses=self.losses, **options, **inputs)
        self.losses = [loss.detach() for loss in self.losses]
        loss = torch.stack(self.losses).sum() if self.losses else self._zero()
        for stage in self.stages:
            loss = loss + stage.take_own_loss()
        return loss

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def _accumulate(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Does one micro-batch after the other, without a pipeline. ZeRO-1 reduces gradients after
        the last; ZeRO-2 and 3 after each, since they keep none whole."""
        [stage] = self.stages
        m = self.plan.micro_batches
        parts = {name: x.chunk(m) for name, x in inputs.items()}
        self.losses = []
        for i, part in enumerate(tokens.chunk(m)):
            if isinstance(stage, FSDPModule):
                last = i == m - 1
                each = self.plan.zero > 1 or self.followed is not None
                stage.set_requires_gradient_sync(last or each)
                stage.set_reshard_after_backward(last or self.plan.zero == 3)
            out: Tensor = stage(part, **{name: x[i] for name, x in parts.items()})
            loss = out.sum()
            loss.backward()
            self.losses.append(loss.detach())
            if self.followed is not None:
                self.followed(stage)
        return torch.stack(self.losses).sum()

    def _schedule(self, rows: int, length: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Returns torch's schedule for micro-batches of rows x length tokens."""
        numbers = stages_of(self.plan, self.mesh.get_local_rank("pp"))
        stages = [
            Followed(
                stage if self.followed is None else Unsynced(stage),
                number,
                self.plan.stages,
                self.device,
                input_args=self._inputs(stage, rows, length),
                output_args=self._outputs(stage, rows, length),
                group=self.mesh.get_group("pp"),
            )
            for stage, number in zip(self.stages, numbers, strict=True)
        ]
        for stage, own in zip(stages, self.stages, strict=True):
            if self.followed is not None:
                stage.followed = functools.partial(self.followed, own)
        options: dict[str, Any] = {"loss_fn": _loss, "scale_grads": False}
        if self.plan.schedule in SINGLE:
            one = SINGLE[self.plan.schedule]
            return one(stages[0], self.plan.micro_batches, **options)
        if torch_has("max_outstanding_sends"):
            # else what was sent is held to the end of the step, for every micro-batch
            options["max_outstanding_sends"] = self.plan.stages
        many = MULTI[self.plan.schedule]
        return many(stages, self.plan.micro_batches, **options)  # type: ignore[arg-type]  # these take a list

    def _inputs(self, stage: Stage, rows: int, length: int) -> tuple[Tensor, ...]:
        if stage.is_first:
            return (torch.empty(rows, length, dtype=torch.int64, device="meta"),)
        return self._carried(rows, length)

    def _outputs(self, stage: Stage, rows: int, length: int) -> tuple[Tensor, ...]:
        if stage.is_last:
            return (torch.empty(1, device="meta", requires_grad=True),)
        return self._carried(rows, length)

    def _carried(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """Returns delta and residual without values;  [B, L, D] or [B, L/t, D]."""
        own = length // self.plan.tp if self.plan.sp else length
        shape = (rows, own, self.config.hidden)
        return tuple(
            torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
            for _ in range(2)
        )


def _loss(output: Tensor, _labels: Tensor) -> Tensor:
    """Returns the last stage's output: it is the loss already."""
    return output.sum()
