from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vendor_sim

# importlib mode leaves sys.path alone; tests use small_glm
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def sound_device() -> Iterator[None]:
    """Removes all defects before and after every test."""
    torch.sim.set_timeout(30.0)
    torch.sim.reset_fallbacks()
    yield
    vendor_sim.clear_faults()
