import sys
from pathlib import Path

# importlib mode leaves sys.path alone; `toy` is shared by these tests and their child processes
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
