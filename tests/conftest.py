import os
import sys
from pathlib import Path

import pytest

# importlib mode leaves sys.path alone; the modules of shared/ serve the tests of
# several rooms and their child processes
sys.path.insert(0, str(Path(__file__).parent / "shared"))

# Containers often forbid byte code. Each process that the tests start would then compile torch
# anew: importing it takes 2.2 s of CPU time with byte code, 5.8 s without.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests marked `long` first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
