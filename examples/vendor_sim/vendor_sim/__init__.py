"""The simulated accelerator: `import vendor_sim` makes the torch device "sim" and the module `torch.sim`."""

from __future__ import annotations

import atexit
import contextlib
from importlib import machinery
from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).with_name("_C" + machinery.EXTENSION_SUFFIXES[0])))

from vendor_sim import device, faults  # noqa: E402  # both need the library's ops
from vendor_sim.faults import clear_faults, fault  # noqa: E402

__all__ = ["clear_faults", "device", "fault"]

torch.utils.rename_privateuse1_backend("sim")
torch._register_device_module("sim", device)
torch.utils.generate_methods_for_privateuse1_backend()
faults.read_environment()


def autoload() -> None:
    """For torch's entry point group `torch.backends`: importing torch brings the device, as this module's import."""


@atexit.register
def _drain() -> None:
    """Kernels must not run while the process is taken down; a lost device has none left."""
    with contextlib.suppress(torch.AcceleratorError):
        device.synchronize()
