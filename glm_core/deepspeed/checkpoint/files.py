"""Names the files of a checkpoint, and loads them without running any code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm_core.errors import CheckpointError

MODEL = "module"
"""the key of the weights in a model file"""


def model_file(mp_rank: int) -> str:
    """Returns the name of a model-parallel rank's model file in ZeRO 0 to 2."""
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def zero3_model_file(dp_rank: int, mp_rank: int) -> str:
    """Returns the name of a model file in ZeRO 3, where every data-parallel rank has its own."""
    return f"zero_pp_rank_{dp_rank}_{model_file(mp_rank)}"


_ARRAY, _SCALAR = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]
NUMPY = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _ARRAY for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _SCALAR for core in ("core", "_core")},
}
"""what makes an array of numbers: scripts save numpy's random state in the client state"""
DTYPES = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]


class _Inert:
    """Stands in for a class of DeepSpeed's in a pickle: keeps its arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_file(path: Path) -> dict[str, Any]:
    """Returns the dict that a file holds, loaded by `load_object`."""
    loaded = load_object(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, no checkpoint; use another"
        )
    return loaded


def load_object(path: Path) -> Any:
    """Loads what torch.save wrote, with tensors on the CPU. Only tensors, numpy's arrays of
    numbers, containers and numbers are built; DeepSpeed's own classes become inert and any other
    class is refused. Raises CheckpointError."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign := [n for n in classes if n not in NUMPY and not n.startswith("deepspeed.")]:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(sorted(foreign))}; only tensors, containers "
                "and DeepSpeed's own are read: save it again without them in the client state"
            )
        # one stand-in class for each name: torch keeps one name per class
        made = {name: NUMPY.get(name) or type("Inert", (_Inert,), {}) for name in classes}
        allowed: list[Any] = [(kind, name) for name, kind in made.items()]
        with torch.serialization.safe_globals([*allowed, *DTYPES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; copy all ranks' files, or use another tag"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({error}); use another"
        ) from None
    except Exception as error:  # torch raises pickle.UnpicklingError, zipfile.BadZipFile, ...
        raise CheckpointError(f"{path}: cannot be read safely ({error}); use another") from None
