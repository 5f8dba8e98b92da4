import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# importlib mode leaves sys.path alone; what several tests share lies beside them
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """Yields the process that forks the ranks of all jobs."""
    from ranks import Ranks

    server = Ranks()
    yield server
    server.close()
