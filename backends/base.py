"""Defines what a backend provides: a name, a device, whether it is usable here, and kernels.

A vendor's package makes one `Backend` and registers kernels with `@backend.implements(ops.NAME)`;
everything else has a default (docs/porting.md)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from glm_core.backends.exact import Exact
from glm_core.backends.graphs import Graphs
from glm_core.decode_step import DecodeStep, Stack
from glm_core.dispatch import Op
from glm_core.session import Kernel
from glm_core.spec import Support, unsupported

F = TypeVar("F", bound=Callable[..., Any])


class Probe(NamedTuple):
    """Whether a backend is usable on this machine."""

    ok: bool
    reason: str = ""
    """why not, and what to do about it"""


class Peak(NamedTuple):
    """The most a device can do, by its maker's figures."""

    tflops: float
    gb_s: float
    source: str
    """where the figures were published"""


def always() -> Probe:
    """Returns usable: the probe of a backend that needs nothing but torch."""
    return Probe(True)


@dataclasses.dataclass(kw_only=True, eq=False)
class Backend:
    """One way to run the ops. Most device calls go through torch's own module of the
    `device_type`; override a method where the vendor's runtime differs."""

    name: str
    device_type: str
    """the device's name in torch: cpu, cuda, npu, or a PrivateUse1 name"""
    verified: str
    """the most that was ever verified, for the support table: run on hardware, executed on the CPU,
    ..."""
    probe: Callable[[], Probe] = always
    collective: str = "gloo"
    """torch.distributed backend: gloo, nccl, hccl"""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """working dtypes whose results are right"""
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    references_only: bool = False
    """the backend has no kernels by design, so a reference that runs here is no fallback"""
    deterministic: bool = True
    """equal calls give equal bits; conformance checks a backend that claims it"""
    exact: Exact | None = None
    """its kernels whose sums have the order of docs/exact.md; None: the backend has none"""

    def implements(
        self, op: Op, supports: Callable[..., Support] | None = None
    ) -> Callable[[F], F]:
        """Registers the decorated function as the op's kernel. `supports` takes the same arguments
        and returns SUPPORTED or unsupported(reason); without it the kernel takes every call. Both
        must have the op's parameters and defaults, or accept **kwargs; TypeError otherwise."""

        def register(kernel: F) -> F:
            for function in (kernel, supports):
                self._check_signature(op, function)
            self.kernels[op.name] = Kernel(kernel, supports)
            return kernel

        return register

    def _check_signature(self, op: Op, function: Callable[..., Any] | None) -> None:
        if function is None:
            return
        expected, received = inspect.signature(op.reference), inspect.signature(function)
        if any(p.kind is p.VAR_KEYWORD for p in received.parameters.values()):
            return
        sides = [[(n, p.default) for n, p in s.parameters.items()] for s in (expected, received)]
        if sides[0] != sides[1]:
            raise TypeError(
                f"backend {self.name}, op {op.name}: parameters must be {expected}; "
                f"received {received}"
            )

    def support(self, op: Op, arguments: Mapping[str, Any]) -> Support:
        """Returns whether `use` would run a kernel for these arguments, or why not."""
        kernel = self.kernels.get(op.name)
        if kernel is None:
            return Support(self.references_only, "no kernel for this op")
        return Support(True) if kernel.supports is None else kernel.supports(**arguments)

    def decode_step(self, stack: Stack) -> DecodeStep | Support:
        """Returns a callable that takes whole decode steps of this model, or unsupported(reason):
        its ops are then called one by one, and the session records the reason."""
        return unsupported("the backend takes no whole decode steps")

    def graphs(self, device: torch.device) -> Graphs | Support:
        """Returns what records this device's work and replays it, or unsupported(reason)."""
        return unsupported(f"backend {self.name} records no graphs")

    def device(self, index: int = 0) -> torch.device:
        """Returns the device that holds this backend's tensors."""
        is_cpu = self.device_type == "cpu"
        return torch.device("cpu") if is_cpu else torch.device(self.device_type, index)

    def synchronize(self) -> None:
        """Waits until all queued work is done."""
        torch.get_device_module(self.device_type).synchronize()

    def memory_peak_bytes(self) -> int:
        """Returns the most device memory allocated since the process began; 0 if it is not
        counted."""
        module = torch.get_device_module(self.device_type)
        return int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else 0

    def rng_state(self) -> torch.Tensor:
        """Returns the state of the device's random generator."""
        if self.device_type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self.device_type).get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restores what `rng_state` returned."""
        if self.device_type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device_type).set_rng_state(state)

    def runtime_fallbacks(self) -> dict[str, int] | None:
        """Returns how many calls, by operator, the vendor's runtime has run on the host so far,
        unseen by our dispatch; None if it does not count them."""
        return None

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """Returns the device's published peak for this dtype; None if it is not known."""
        return None
