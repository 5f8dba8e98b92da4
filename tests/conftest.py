import sys
from pathlib import Path

# importlib mode leaves sys.path alone; the modules of shared/ serve the tests of
# several rooms and their child processes
sys.path.insert(0, str(Path(__file__).parent / "shared"))
