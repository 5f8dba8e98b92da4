from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vendor_sim

# importlib mode leaves sys.path alone; tests use small_glm
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the commands first: they are forks of this process, whose device has not started yet."""
    items.sort(key=lambda item: item.path.stem != "test_verdicts")


@pytest.fixture(autouse=True)
def sound_device() -> Iterator[None]:
    """Removes all defects before and after every test."""
    torch.sim.set_timeout(30.0)
    torch.sim.reset_fallbacks()
    yield
    vendor_sim.clear_faults()
