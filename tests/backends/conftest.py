import sys
from pathlib import Path

# importlib mode leaves sys.path alone; the modules without test_ are shared by these tests
sys.path.insert(0, str(Path(__file__).parent))
