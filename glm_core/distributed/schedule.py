"""Orders the forwards and backwards of a step's micro-batches on one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
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


class Lean(PipelineStage):
    """A stage whose receive buffers exist only from the receive to their last use. torch's own
    (2.13) holds one for every micro-batch of the step, from the first step on."""

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(1, has_backward)
        self.args_recv_info = _per_micro_batch(self.args_recv_info[0], num_microbatches)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(1)
        self.chunks = num_microbatches
        self.grad_recv_info = _per_micro_batch(self.grad_recv_info[0], num_microbatches)

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        for info in recv_infos:
            if not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty_strided(
                    meta.shape, meta.stride, dtype=meta.dtype, device=self.device
                )
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        values = super()._retrieve_recv_activations(fwd_chunk_id)
        _drop_buffers(self.args_recv_info[fwd_chunk_id])
        return values

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        values = super()._retrieve_recv_grads(bwd_chunk_id)
        _drop_buffers(self.grad_recv_info[bwd_chunk_id])
        return values


def _per_micro_batch(recv_infos: Any, num_microbatches: int) -> dict[int, Any]:
    _drop_buffers(recv_infos)
    return {i: tuple(map(copy.copy, recv_infos)) for i in range(num_microbatches)}


def _drop_buffers(recv_infos: Any) -> None:
    for info in recv_infos:
        info.buffer = None


class OneForwardOneBackward(Schedule1F1B):
    """1F1B that also takes fewer micro-batches than stages: torch's loop can, but its constructor
    refuses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        PipelineScheduleSingle.__init__(self, *args, **kwargs)


SINGLE: dict[str, type[PipelineScheduleSingle]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": OneForwardOneBackward,
}
MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Work:
    """Runs a process's stages over a step's micro-batches; gradients are summed, not averaged."""

    def __init__(
        self,
        stages: list[Stage],
        plan: Plan,
        mesh: DeviceMesh,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.stages, self.plan, self.mesh = stages, plan, mesh
        self.config, self.device, self.dtype = config, device, dtype
        self.shape: tuple[int, int] = (0, 0)
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None

    def run(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Does forward and backward of this data-parallel rank's rows. Returns their loss where the
        last stage is held, else 0; a float32 scalar."""
        if self.plan.pp == 1:
            return self._accumulate(tokens, inputs)
        rows, length = tokens.shape
        if self.schedule is None or self.shape != (rows, length):
            # the size of what travels is agreed once; a growing batch changes it
            self.shape = (rows, length)
            self.schedule = self._schedule(rows // self.plan.micro_batches, length)
        losses: list[Tensor] = []
        first = (tokens,) if any(s.is_first for s in self.stages) else ()
        self.schedule.step(
            *first, target=inputs["labels"], losses=losses, return_outputs=False, **inputs
        )
        return torch.stack(losses).sum().detach() if losses else self._zero()

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def _accumulate(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Does one micro-batch after the other, without a pipeline. ZeRO-1 reduces gradients after
        the last; ZeRO-2 and 3 after each, since they keep none whole."""
        [stage] = self.stages
        m = self.plan.micro_batches
        parts = {name: x.chunk(m) for name, x in inputs.items()}
        loss = self._zero()
        for i, part in enumerate(tokens.chunk(m)):
            if isinstance(stage, FSDPModule):
                last = i == m - 1
                stage.set_requires_gradient_sync(last or self.plan.zero > 1)
                stage.set_reshard_after_backward(last or self.plan.zero == 3)
            out: Tensor = stage(part, **{name: x[i] for name, x in parts.items()})
            out.sum().backward()
            loss += out.detach().sum()
        return loss

    def _schedule(self, rows: int, length: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Returns torch's schedule for micro-batches of rows x length tokens."""
        numbers = stages_of(self.plan, self.mesh.get_local_rank("pp"))
        stages = [
            Lean(
                stage,
                number,
                self.plan.stages,
                self.device,
                input_args=self._inputs(stage, rows, length),
                output_args=self._outputs(stage, rows, length),
                group=self.mesh.get_group("pp"),
            )
            for stage, number in zip(self.stages, numbers, strict=True)
        ]
        options: dict[str, Any] = {"loss_fn": _loss, "scale_grads": False}
        if self.plan.schedule in SINGLE:
            one = SINGLE[self.plan.schedule]
            return one(stages[0], self.plan.micro_batches, **options)
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
