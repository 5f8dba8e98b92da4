import sys
from pathlib import Path

# importlib mode leaves sys.path alone; what several tests share lies beside them
sys.path.insert(0, str(Path(__file__).parent))
