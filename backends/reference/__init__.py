"""Declares the backend that runs the reference ops in plain torch: `reference` on the CPU,
`reference:<device>` on any device that torch knows."""

from __future__ import annotations

import torch

from glm_core.backends.base import Backend, Probe

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VERIFIED = {"cpu": "run on x86-64 CPUs", "mps": "never run"}
"""by device type"""


def variant(option: str) -> Backend:
    """Returns the reference backend on device type `option`; an empty option is the CPU."""
    device_type = option or "cpu"
    held = tuple(d for d in DTYPES if _holds(device_type, d))

    def probe() -> Probe:
        try:
            torch.empty(1, device=device_type).add_(1)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            return Probe(False, f"torch cannot use device {device_type!r}: {reason}")
        return Probe(True)

    return Backend(
        name=f"reference:{option}" if option else "reference",
        device_type=device_type,
        verified=VERIFIED.get(device_type, "not run on this device by us"),
        dtypes=held or DTYPES,
        probe=probe,
        references_only=True,
    )


def _holds(device_type: str, dtype: torch.dtype) -> bool:
    """Returns whether the device stores this dtype: mps and some others have no float64."""
    try:
        torch.ones(1, dtype=dtype, device=device_type)
    except (RuntimeError, AssertionError, TypeError):  # TypeError: mps's word for it
        return False
    return True
