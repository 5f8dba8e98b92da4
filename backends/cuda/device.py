"""Measures GPUs that torch calls `cuda`: NVIDIA's, and AMD's and Hygon's through HIP."""

from __future__ import annotations

import torch

from glm_core import dispatch
from glm_core.backends.base import Backend, Peak
from glm_core.backends.cuda import peaks
from glm_core.backends.cuda.decode_graph import CudaGraphs, GraphDecodeStep
from glm_core.backends.cuda.decode_ops import recordable
from glm_core.backends.graphs import Graphs
from glm_core.decode_step import DecodeStep, Stack
from glm_core.spec import Support, unsupported


class GpuBackend(Backend):
    """A backend whose kernels are queued on torch's current stream, so that torch.cuda.stream,
    events and graphs apply to them."""

    def decode_step(self, stack: Stack) -> DecodeStep | Support:
        """Returns the model's steps, to be recorded as graphs, or why they are not recorded."""
        if dispatch.session().exact:
            return unsupported("exact: the kernels of recorded steps sum in another order")
        support = recordable(stack)
        if not support.ok:
            return support
        return GraphDecodeStep(stack, self.graphs(stack.embedding.device))

    def graphs(self, device: torch.device) -> Graphs:
        """Returns what records the work of this device."""
        return CudaGraphs(device)

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """Returns the data sheet's figures for the device's name, None where it is not listed."""
        return peaks.peak(torch.cuda.get_device_name(self.device()), dtype)

    def memory_peak_bytes(self) -> int:
        """Returns the most bytes that tensors have held since the start, without the allocator's
        own reserve."""
        return int(torch.cuda.max_memory_allocated(self.device()))
