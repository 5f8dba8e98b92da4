"""Declares the backend that runs the reference ops in plain torch: `reference` on the CPU,
`reference:<device>` on any device that torch knows."""

from __future__ import annotations

import torch

from glm_core.backends.base import Backend, Probe


def variant(option: str) -> Backend:
    """Returns the reference backend on device type `option`; an empty option is the CPU."""
    device_type = option or "cpu"

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
        verified="run on x86-64 CPUs" if device_type == "cpu" else "not run on this device by us",
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        probe=probe,
        references_only=True,
    )
