"""Sends tensors between neighbouring stages: one tensor or a tuple of any dtypes. Those that
require a gradient get it sent back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.runtime.pipe.topology import PipelineParallelGrid
from glm_core.errors import TrainingError

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
"""a header names a dtype by its index here"""
HEADER = 256
"""length of a header, the message of int64 numbers that describes the tensors that follow it"""


class Kind(NamedTuple):
    """A tensor that is sent, without its values."""

    dtype: torch.dtype
    has_gradient: bool
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """A stage's outputs, without their values."""

    is_tuple: bool
    kinds: tuple[Kind, ...]


def layout(outputs: Any) -> Layout:
    """Returns the layout of a stage's outputs. Raises TrainingError for what cannot be sent."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    for x in tensors:
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TrainingError(
                f"pipeline: the last layer of a stage returns {what}; return a tensor or a tuple "
                "of tensors"
            )
    kinds = tuple(Kind(x.dtype, x.requires_grad, tuple(x.shape)) for x in tensors)
    return Layout(isinstance(outputs, tuple), kinds)


def encode(outputs: Layout) -> list[int]:
    """Returns the header of a layout: whether it is a tuple, the number of tensors, and for each
    its dtype, whether it has a gradient, its number of dimensions and their sizes. Raises
    TrainingError where these are more than HEADER numbers."""
    numbers = [int(outputs.is_tuple), len(outputs.kinds)]
    for kind in outputs.kinds:
        numbers += [DTYPES.index(kind.dtype), int(kind.has_gradient), len(kind.shape), *kind.shape]
    if len(numbers) > HEADER:
        raise TrainingError(
            f"pipeline: {len(outputs.kinds)} tensors are too many to describe in {HEADER} numbers; "
            "pass fewer from stage to stage"
        )
    return numbers + [0] * (HEADER - len(numbers))


def decode(numbers: list[int]) -> Layout:
    """Returns the layout that `encode` described."""
    kinds, at = [], 2
    for _ in range(numbers[1]):
        dtype, has_gradient, dims = numbers[at : at + 3]
        shape = tuple(numbers[at + 3 : at + 3 + dims])
        kinds.append(Kind(DTYPES[dtype], bool(has_gradient), shape))
        at += 3 + dims
    return Layout(bool(numbers[0]), tuple(kinds))


class Channel:
    """This stage's connections to the previous and the next stage. Every call blocks until its
    tensors are sent or received, and keeps none of them. So both ends must make matching calls in
    the same order."""

    def __init__(self, grid: PipelineParallelGrid, device: torch.device, dynamic: bool) -> None:
        """dynamic: a header goes before every micro-batch, not once per batch."""
        stage, ranks = grid.stage_id, grid.pp_group
        self.previous = ranks[stage - 1] if stage else None
        self.next = ranks[stage + 1] if stage + 1 < len(ranks) else None
        self.group, self.device, self.dynamic = grid.pp_proc_group, device, dynamic
        self._sent_layout: Layout | None = None
        self._received_layout: Layout | None = None

    def begin(self) -> None:
        """Starts a new batch: its first micro-batch sends its layout again."""
        self._sent_layout = self._received_layout = None

    def send(self, outputs: Any) -> None:
        """Sends a stage's outputs to the next one. Raises TrainingError where a micro-batch's
        layout differs from the batch's first and the channel is not dynamic."""
        if self.next is None:
            return
        own = layout(outputs)
        if self.dynamic or self._sent_layout is None:
            self._send(torch.tensor(encode(own), device=self.device), self.next)
        elif own != self._sent_layout:
            raise TrainingError(
                f"pipeline: a micro-batch passes {_words(own)}, the batch's first "
                f"{_words(self._sent_layout)}; pass dynamic_shape=True to PipelineModule"
            )
        self._sent_layout = own
        for x in outputs if isinstance(outputs, tuple) else (outputs,):
            self._send(x, self.next)

    def receive(self) -> Any:
        """Receives the previous stage's outputs. They are leaves, and require a gradient where they
        did there."""
        assert self.previous is not None
        if self.dynamic or self._received_layout is None:
            header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
            dist.recv(header, self.previous, self.group)
            self._received_layout = decode(header.tolist())
        tensors = tuple(
            self._receive(k.dtype, k.shape, self.previous).requires_grad_(k.has_gradient)
            for k in self._received_layout.kinds
        )
        return tensors if self._received_layout.is_tuple else tensors[0]

    def send_gradients(self, gradients: list[Tensor]) -> None:
        """Sends the previous stage the gradients of the tensors it sent that require one."""
        for x in gradients:
            self._send(x, self.previous)

    def receive_gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Receives the gradients of these tensors from the next stage."""
        return [self._receive(x.dtype, tuple(x.shape), self.next) for x in outputs]

    def _send(self, x: Tensor, to: int | None) -> None:
        if x.numel():  # an empty message would never arrive
            dist.send(x.detach().contiguous(), to, self.group)

    def _receive(self, dtype: torch.dtype, shape: tuple[int, ...], source: int | None) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        if x.numel():
            dist.recv(x, source, self.group)
        return x


def _words(outputs: Layout) -> str:
    return ", ".join(f"{str(k.dtype).removeprefix('torch.')}{list(k.shape)}" for k in outputs.kinds)
