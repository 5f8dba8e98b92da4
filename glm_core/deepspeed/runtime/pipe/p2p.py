"""What travels between neighbouring stages: a tensor or a tuple of tensors of any dtypes, of which
each may or may not have a gradient that travels back."""

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
"""by their number in a header"""
HEADER = 256
"""numbers in a header"""


class Kind(NamedTuple):
    """One travelling tensor without its values."""

    dtype: torch.dtype
    has_gradient: bool
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """What a stage passes on."""

    is_tuple: bool
    kinds: tuple[Kind, ...]


def layout(outputs: Any) -> Layout:
    """Of a stage's outputs. Raises TrainingError for what cannot travel."""
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


def encode(what: Layout) -> list[int]:
    """A layout as numbers. Raises TrainingError where they are too many."""
    numbers = [int(what.is_tuple), len(what.kinds)]
    for kind in what.kinds:
        numbers += [DTYPES.index(kind.dtype), int(kind.has_gradient), len(kind.shape), *kind.shape]
    if len(numbers) > HEADER:
        raise TrainingError(
            f"pipeline: {len(what.kinds)} tensors are too many to describe in {HEADER} numbers; "
            "pass fewer from stage to stage"
        )
    return numbers + [0] * (HEADER - len(numbers))


def decode(numbers: list[int]) -> Layout:
    """The layout that `encode` wrote."""
    kinds, at = [], 2
    for _ in range(numbers[1]):
        dtype, has_gradient, dims = numbers[at : at + 3]
        shape = tuple(numbers[at + 3 : at + 3 + dims])
        kinds.append(Kind(DTYPES[dtype], bool(has_gradient), shape))
        at += 3 + dims
    return Layout(bool(numbers[0]), tuple(kinds))


class Channel:
    """This stage's ends of the lines to its neighbours. Both ends of a line must do the same in the
    same order: every call returns when its tensors are on their way or there, and holds none."""

    def __init__(self, grid: PipelineParallelGrid, device: torch.device, dynamic: bool) -> None:
        """dynamic: the layout is told with every message, not once per batch."""
        stage, line = grid.stage_id, grid.pp_group
        self.previous = line[stage - 1] if stage else None
        self.next = line[stage + 1] if stage + 1 < len(line) else None
        self.group, self.device, self.dynamic = grid.pp_proc_group, device, dynamic
        self._told: Layout | None = None
        self._heard: Layout | None = None

    def begin(self) -> None:
        """A new batch: layouts are told anew."""
        self._told = self._heard = None

    def send(self, outputs: Any) -> None:
        """A stage's outputs to the next one. Raises TrainingError where a micro-batch differs from
        the batch's first and the channel is not dynamic."""
        if self.next is None:
            return
        own = layout(outputs)
        if self.dynamic or self._told is None:
            self._send(torch.tensor(encode(own), device=self.device), self.next)
        elif own != self._told:
            raise TrainingError(
                f"pipeline: a micro-batch passes {_words(own)}, the batch's first "
                f"{_words(self._told)}; pass dynamic_shape=True to PipelineModule"
            )
        self._told = own
        for x in outputs if isinstance(outputs, tuple) else (outputs,):
            self._send(x, self.next)

    def receive(self) -> Any:
        """What the stage before sent; leaves, of which those require a gradient that had one."""
        assert self.previous is not None
        if self.dynamic or self._heard is None:
            header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
            dist.recv(header, self.previous, self.group)
            self._heard = decode(header.tolist())
        found = tuple(
            self._receive(k.dtype, k.shape, self.previous).requires_grad_(k.has_gradient)
            for k in self._heard.kinds
        )
        return found if self._heard.is_tuple else found[0]

    def send_gradients(self, gradients: list[Tensor]) -> None:
        """To the stage before, of what it sent that has one."""
        for x in gradients:
            self._send(x, self.previous)

    def receive_gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """From the next stage, of these tensors sent to it."""
        return [self._receive(x.dtype, tuple(x.shape), self.next) for x in outputs]

    def _send(self, x: Tensor, to: int | None) -> None:
        if x.numel():  # an empty message would wait for ever
            dist.send(x.detach().contiguous(), to, self.group)

    def _receive(self, dtype: torch.dtype, shape: tuple[int, ...], source: int | None) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        if x.numel():
            dist.recv(x, source, self.group)
        return x


def _words(what: Layout) -> str:
    return ", ".join(f"{str(k.dtype).removeprefix('torch.')}{list(k.shape)}" for k in what.kinds)
