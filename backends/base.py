"""What a backend must say: its name, its device, whether it is usable here, and its kernels."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from glm_core.decode_step import DecodeStep, Stack
from glm_core.dispatch import Op
from glm_core.session import Kernel
from glm_core.spec import Support

F = TypeVar("F", bound=Callable[..., Any])


class Probe(NamedTuple):
    """Usable on this machine? If not, why, and the way out."""

    ok: bool
    reason: str = ""


class Peak(NamedTuple):
    """The most a device can do, and where the figure comes from."""

    tflops: float
    gb_s: float
    source: str


def always() -> Probe:
    """For backends that need nothing but torch."""
    return Probe(True)


@dataclasses.dataclass(kw_only=True, eq=False)
class Backend:
    """One way to run the ops. Most device calls follow from `device_type` through torch's own
    device module; override a method where the vendor's runtime differs."""

    name: str
    device_type: str
    """torch's name of the device: cpu, cuda, npu, a PrivateUse1 name"""
    verified: str
    """how far this was ever verified, in the support table's words: run on hardware, executed on
    the CPU, ..."""
    probe: Callable[[], Probe] = always
    collective: str = "gloo"
    """torch.distributed backend: gloo, nccl, hccl"""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """working dtypes"""
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    references_only: bool = False
    """by design this backend has no kernels: a reference that runs here is not a fallback"""
    in_process: bool = True
    """kernels run on torch tensors in this process and can be traced by torch.compile"""
    deterministic: bool = True
    """the same call gives the same bits; conformance holds a backend that claims it to it"""

    def implements(
        self, op: Op, supports: Callable[..., Support] | None = None
    ) -> Callable[[F], F]:
        """Registers a kernel. `supports` sees the call's arguments and answers SUPPORTED or
        unsupported(reason). Raises TypeError where the kernel's or the predicate's parameters are
        not the op's own."""

        def register(kernel: F) -> F:
            for function in (kernel, supports):
                self._check_signature(op, function)
            self.kernels[op.name] = Kernel(kernel, supports)
            return kernel

        return register

    def _check_signature(self, op: Op, function: Callable[..., Any] | None) -> None:
        if function is None:
            return
        own, kernel = (
            inspect.signature(op.reference).parameters,
            inspect.signature(function).parameters,
        )
        variadic = any(p.kind is p.VAR_KEYWORD for p in kernel.values())
        facts = [{n: p.default for n, p in ps.items()} for ps in (own, kernel)]
        if not variadic and (facts[0] != facts[1] or list(own) != list(kernel)):
            raise TypeError(
                f"backend {self.name}, op {op.name}: parameters must be "
                f"{inspect.signature(op.reference)}; received {inspect.signature(function)}"
            )

    def support(self, op: Op, arguments: Mapping[str, Any]) -> Support:
        """Would a kernel run for these arguments?"""
        kernel = self.kernels.get(op.name)
        if kernel is None:
            return Support(self.references_only, "no kernel for this op")
        return Support(True) if kernel.supports is None else kernel.supports(**arguments)

    def decode_step(self, stack: Stack) -> DecodeStep | None:
        """Takes a whole decode step of this model; None (the default): ops are called one by
        one."""
        return None

    def device(self, index: int = 0) -> torch.device:
        """The device tensors of this backend live on."""
        return (
            torch.device("cpu")
            if self.device_type == "cpu"
            else torch.device(self.device_type, index)
        )

    def synchronize(self) -> None:
        """Returns when all queued work is done."""
        torch.get_device_module(self.device_type).synchronize()

    def memory_peak_bytes(self) -> int:
        """Most device memory allocated since the start of the process; 0 where the device does not
        count."""
        module = torch.get_device_module(self.device_type)
        return int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else 0

    def rng_state(self) -> torch.Tensor:
        """State of the device's random generator."""
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
        """Calls so far, by operator, that the vendor's runtime has run on the host below our
        dispatch; None where the runtime does not count them."""
        return None

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """Published peak of the device for this dtype, None where no figure is known."""
        return None
