from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import vendor_sim


@pytest.fixture(autouse=True)
def sound_device() -> Iterator[None]:
    """Removes all defects before and after every test."""
    torch.sim.set_timeout(30.0)
    torch.sim.reset_fallbacks()
    yield
    vendor_sim.clear_faults()
