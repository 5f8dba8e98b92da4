"""Lists what a pipeline stage does, step by step (`deepspeed.runtime.pipe.schedule`).
PipelineEngine computes in this order; tools and tests read it. M micro-batches, S stages,
stage s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from glm_core.errors import ConfigError


class PipeInstruction:
    """One action of a stage. Keyword arguments become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.name, self.kwargs = type(self).__name__, kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.kwargs.items())
        return f"{self.name}({arguments})"


class OptimizerStep(PipeInstruction):
    """Updates the weights."""


class ReduceGrads(PipeInstruction):
    """Sums the gradients over the replicas."""


class ReduceTiedGrads(PipeInstruction):
    """Sums the gradients of tied layers over their stages."""


class BufferOpInstruction(PipeInstruction):
    """An action on the activations of one micro-batch, which are in buffer `buffer_id`."""

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Takes a micro-batch of the training data."""


class ForwardPass(BufferOpInstruction):
    """Computes the stage's layers."""


class BackwardPass(BufferOpInstruction):
    """Computes their gradients."""


class SendActivation(BufferOpInstruction):
    """Sends outputs to the next stage."""


class RecvActivation(BufferOpInstruction):
    """Receives inputs from the previous stage."""


class SendGrad(BufferOpInstruction):
    """Sends the inputs' gradients to the previous stage."""


class RecvGrad(BufferOpInstruction):
    """Receives the outputs' gradients from the next stage."""


class PipeSchedule:
    """Yields the list of instructions of each step; between two steps all stages may wait for each
    other."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        if not (micro_batches > 0 and 0 <= stage_id < stages):
            raise ConfigError(
                f"pipeline schedule: micro_batches={micro_batches}, stages={stages}, "
                f"stage_id={stage_id}; give at least one micro-batch and a stage from 0 to "
                "stages - 1"
            )
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id
        self.prev_stage, self.next_stage = stage_id - 1, stage_id + 1

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields each step's instructions."""
        raise NotImplementedError

    def num_pipe_buffers(self) -> int:
        """Returns how many micro-batches' activations the stage keeps at most."""
        return self.micro_batches

    @property
    def stage(self) -> int:
        return self.stage_id

    @property
    def num_stages(self) -> int:
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.stages - 1

    def __iter__(self) -> Iterator[list[PipeInstruction]]:
        return self.steps()

    def _exists(self, micro_batch: int) -> bool:
        return 0 <= micro_batch < self.micro_batches

    def _buffer(self, micro_batch: int) -> int:
        return micro_batch % self.num_pipe_buffers()


class InferenceSchedule(PipeSchedule):
    """Forward only: stage s computes micro-batch m in step m + s, and sends it in the next one."""

    def num_pipe_buffers(self) -> int:
        """Returns 2: one that is computed, one that is sent."""
        return 2

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields M + S - 1 steps."""
        for step in range(self.micro_batches + self.stages - 1):
            now = step - self.stage_id
            take: list[PipeInstruction] = []
            give: list[PipeInstruction] = []
            if self._exists(now) and not self.is_first_stage:
                take.append(RecvActivation(self._buffer(now)))
            if self._exists(now - 1) and not self.is_last_stage:
                give.append(SendActivation(self._buffer(now - 1)))
            does: list[PipeInstruction] = []
            if self._exists(now) and (self.is_first_stage or self.is_last_stage):
                does.append(LoadMicroBatch(self._buffer(now)))
            # even stages send first, odd ones receive first: blocking calls meet
            does += give + take if self.stage_id % 2 == 0 else take + give
            if self._exists(now):
                does.append(ForwardPass(self._buffer(now)))
            yield does


class TrainSchedule(PipeSchedule):
    """1F1B: stage s computes micro-batch m forward in step 2 m + s and backward in step
    2 m + 2 S - 1 - s. What a step has computed is sent in the next one."""

    def num_pipe_buffers(self) -> int:
        """Returns S - s, the micro-batches between a forward and its backward; at least 2, at most
        M where that is more."""
        return max(2, min(self.stages - self.stage_id, self.micro_batches))

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields 2 (M + S - 1) steps; the last one ends with the update."""
        last = 2 * (self.micro_batches + self.stages - 1) - 1
        for step in range(last + 1):
            does = [*self._messages(step), *self._computation(step)]
            if step == last:
                does += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            yield does

    def _is_forward(self, step: int) -> bool:
        return (step - self.stage_id) % 2 == 0

    def _at(self, step: int) -> int:
        """Returns the micro-batch of a step, which need not exist."""
        if self._is_forward(step):
            return (step - self.stage_id) // 2
        return (step - (2 * self.stages - 1 - self.stage_id)) // 2

    def _messages(self, step: int) -> Iterator[PipeInstruction]:
        now, before = self._at(step), self._at(step - 1)
        sends, receives = step > 0 and self._exists(before), self._exists(now)
        if self._is_forward(step) and not self.is_first_stage:
            if sends:
                yield SendGrad(self._buffer(before))
            if receives:
                yield RecvActivation(self._buffer(now))
        elif not self._is_forward(step) and not self.is_last_stage:
            if receives:
                yield RecvGrad(self._buffer(now))
            if sends:
                yield SendActivation(self._buffer(before))

    def _computation(self, step: int) -> Iterator[PipeInstruction]:
        now = self._at(step)
        if not self._exists(now):
            return
        if not self._is_forward(step):
            yield BackwardPass(self._buffer(now))
            return
        if self.is_first_stage or self.is_last_stage:
            yield LoadMicroBatch(self._buffer(now))
        yield ForwardPass(self._buffer(now))


class DataParallelSchedule(PipeSchedule):
    """One stage: every step is a micro-batch, the last one ends with the update."""

    def num_pipe_buffers(self) -> int:
        """Returns 1."""
        return 1

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields M steps."""
        for step in range(self.micro_batches):
            does: list[PipeInstruction] = [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0)]
            if step == self.micro_batches - 1:
                does += [ReduceGrads(), OptimizerStep()]
            yield does
