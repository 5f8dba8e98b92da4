import sys
from pathlib import Path

# importlib mode leaves sys.path alone; `foreign` is shared with the unit tests
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
