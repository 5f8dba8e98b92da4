"""Holds every difference between the versions of Python and torch that the package runs on.

NEWER has an entry per name that the oldest version lacks: `from glm_core.versions import NAME`
gives the newer thing where it exists and its stand-in where it does not. When the oldest version
moves up, delete the entries up to it and import the names from where they are. Nothing here imports
torch before a name of it is asked for. This file and glm_core/__init__.py also have to load on
older versions of Python, to say that they are too old."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from importlib import metadata
from typing import Any, BinaryIO, NamedTuple

PYTHON = (3, 10)
"""the oldest version of Python that the package runs on; pyproject.toml says so too"""
TORCH = (2, 7)
"""the oldest version of torch"""
TRIED = (2, 15)
"""the newest version of torch with which the suite ran"""


class Newer(NamedTuple):
    """One name that not every version in the window has."""

    where: str
    """`module` or `module:attribute`"""
    since: str
    """the first version with it: `torch 2.13`, `Python 3.11`"""
    stand_in: str
    """what is used before that version, written like `where`; empty: nothing can be"""


_DIST, _FUNCTIONAL = "torch.distributed", "torch.distributed._functional_collectives"
NEWER = {
    "tomllib": Newer("tomllib", "Python 3.11", "tomli"),
    "co_qualname": Newer(
        "types:CodeType.co_qualname.__get__", "Python 3.11", "types:CodeType.co_name.__get__"
    ),
    "file_digest": Newer("hashlib:file_digest", "Python 3.11", f"{__name__}:_file_digest"),
    # ask is_accelerator_error too: before torch 2.8 not every RuntimeError is the device's
    "AcceleratorError": Newer("torch:AcceleratorError", "torch 2.8", "builtins:RuntimeError"),
    # the older names of these four warn since torch 2.13
    "all_gather_single": Newer(
        f"{_DIST}:all_gather_single", "torch 2.13", f"{_DIST}:all_gather_into_tensor"
    ),
    "reduce_scatter_single": Newer(
        f"{_DIST}:reduce_scatter_single", "torch 2.13", f"{_DIST}:reduce_scatter_tensor"
    ),
    # the older name warns since torch 2.14
    "set_timeout": Newer(
        f"{_DIST}:set_timeout", "torch 2.14", f"{_DIST}.distributed_c10d:_set_pg_timeout"
    ),
    "functional_all_gather": Newer(
        f"{_FUNCTIONAL}:all_gather_single", "torch 2.13", f"{_FUNCTIONAL}:all_gather_tensor"
    ),
    "functional_reduce_scatter": Newer(
        f"{_FUNCTIONAL}:reduce_scatter_single", "torch 2.13", f"{_FUNCTIONAL}:reduce_scatter_tensor"
    ),
}

CHANGED = {
    # collectives on tensors without values; 2.10 was not tried
    "fake_collectives": (2, 11),
    # Tensor.grad_dtype: before, a parameter has it as any attribute and torch does not read it;
    # 2.10 was not tried
    "grad_dtype": (2, 11),
    # FSDPModule.set_force_sum_reduction_for_comms, set_gradient_divide_factor; 2.8 was not tried
    "fsdp_sums": (2, 9),
    # gloo greets on standard error, if at all; 2.10 was not tried
    "quiet_gloo": (2, 11),
    # an argument of c10d's operators tells which reduction it is; 2.10 was not tried
    "named_reductions": (2, 11),
    # an option of a schedule's step; 2.9 hands it to the model, 2.10 was not tried
    "return_outputs": (2, 11),
    # the constructor that schedules with one stage per rank share; 2.10 was not tried
    "few_micro_batches": (2, 11),
    # schedules that compute the weights' gradients apart: before, what a parameter's neighbour
    # passes on is counted twice (2.11: gradients of 10B's blocks are wrong); 2.12 was not tried
    "weight_gradients_apart": (2, 13),
    # pipelining.schedules._batch_p2p; 2.8 was not tried
    "keeps_every_message": (2, 9),
    # PipelineStage: a buffer for every micro-batch of the step before
    "lean_receive_buffers": (2, 15),
    # an option of the schedules with several stages per rank, which hold what they have sent
    "max_outstanding_sends": (2, 15),
}
"""what torch does otherwise under the same name: the first version that does it"""

REFUSED = {
    "fsdp_sums": "a plan with ZeRO",
    "fake_collectives": "glm-core plan dry-run",
    "weight_gradients_apart": "the schedule zero-bubble or zbv",
}
"""what is refused where the running torch does not have an entry of CHANGED"""


def torch_has(change: str) -> bool:
    """Says whether the running torch has this entry of CHANGED."""
    major, minor = torch_version().split(".")[:2]
    return (int(major), int(minor)) >= CHANGED[change]


def lack_of(change: str, subject: str) -> str:
    """Returns that the subject needs the torch that first has this entry of CHANGED, or "" where
    the running one has it."""
    if torch_has(change):
        return ""
    return f"{subject} needs torch {_dotted(CHANGED[change])} or newer; here is {torch_version()}"


def notes() -> list[str]:
    """Returns a sentence for everything the running torch is too old for, or that it is newer than
    any with which the suite ran."""
    found = [lack_of(change, subject) for change, subject in REFUSED.items()]
    major, minor = torch_version().split(".")[:2]
    if (int(major), int(minor)) > TRIED:
        found.append(f"torch {torch_version()} is newer than any that was tried ({_dotted(TRIED)})")
    return [note for note in found if note]


def __getattr__(name: str) -> Any:
    """Returns the newer thing called `name` in NEWER, or its stand-in. Raises ConfigError where
    this version has neither."""
    if name not in NEWER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    entry = NEWER[name]
    for where in filter(None, (entry.where, entry.stand_in)):
        found = _found(where)
        if found is not None:
            globals()[name] = found
            return found
    from glm_core.errors import ConfigError

    raise ConfigError(lack(name))


def lack(name: str) -> str:
    """Returns why the entry `name` of NEWER cannot be had here: what is missing and which version
    has it. Returns "" where it can."""
    entry = NEWER[name]
    if any(_found(where) is not None for where in (entry.where, entry.stand_in) if where):
        return ""
    running = f"torch {torch_version()}" if entry.since.startswith("torch") else _python()
    plain = entry.where.replace(":", ".")
    return f"{plain}: {running} does not have it; use {entry.since} or newer"


def _found(where: str) -> Any:
    """Returns the module, or the attribute of it, that `where` names; None where there is none."""
    module, _, attribute = where.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    found: Any = loaded
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part, None)
    return found


def _file_digest(file: BinaryIO, name: str) -> Any:
    digest = hashlib.new(name)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def is_accelerator_error(error: BaseException) -> bool:
    """Says whether the device itself failed: torch.AcceleratorError, or before torch 2.8 a
    RuntimeError whose text begins like `CUDA error: `."""
    kind = sys.modules[__name__].AcceleratorError
    if kind is not RuntimeError:
        return isinstance(error, kind)
    return type(error) is RuntimeError and bool(_DEVICE_TEXT.match(str(error)))


_DEVICE_TEXT = re.compile(r"[A-Z]{2,} (function )?error: ")


def torch_version() -> str:
    """Returns the version of the installed torch, such as `2.9.0+das.opt1.dtk2604`; "" where none
    is installed. It imports no torch."""
    if "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def release(version: str) -> str:
    """Returns a version without what a vendor adds to it: 2.9.0 of `2.9.0+das.opt1.dtk2604`."""
    return version.partition("+")[0]


def check() -> None:
    """Refuses a Python or a torch that is older than the window, in one line: a command ends with
    it, a program that imports the package gets it as an ImportError."""
    fact = too_old()
    if not fact:
        return
    if os.path.basename(sys.argv[0]) in ("glm-core", "-m"):
        print(f"glm-core: {fact}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(fact)


def too_old() -> str:
    """Returns what is older than the window and the way out, or ""."""
    if sys.version_info < PYTHON:
        return f"{_python()} is too old; run glm_core with Python {_dotted(PYTHON)} or newer"
    found = torch_version()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < TORCH:
        return f"torch {found} is too old; install torch {_dotted(TORCH)} or newer"
    return ""


def _python() -> str:
    return f"Python {_dotted(sys.version_info[:3])}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
