"""Registers the simulated accelerator: torch's device "sim" and its module `torch.sim`."""

from __future__ import annotations

import atexit
import contextlib
from importlib import machinery
from pathlib import Path

import torch
from torch.utils import backend_registration

torch.ops.load_library(str(Path(__file__).with_name("_C" + machinery.EXTENSION_SUFFIXES[0])))

from vendor_sim import comm, device, faults  # noqa: E402  # these need the library's ops
from vendor_sim.faults import clear_faults, fault  # noqa: E402

__all__ = ["clear_faults", "comm", "device", "fault"]

backend_registration.rename_privateuse1_backend("sim")
torch._register_device_module("sim", device)
backend_registration.generate_methods_for_privateuse1_backend()
faults.read_environment()


@atexit.register
def _drain() -> None:
    """Waits for the queue, since kernels must not run while the process exits; a lost device has
    nothing to wait for."""
    with contextlib.suppress(RuntimeError):  # torch.AcceleratorError, since torch 2.8
        device.synchronize()
