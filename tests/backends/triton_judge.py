"""Runs conformance of the Triton kernels in Triton's interpreter, on the CPU: `python
triton_judge.py float32,bfloat16 [MOST]` prints {case: "" or what is wrong}. A process of its own:
whether kernels are interpreted is settled when Triton is imported. `[MOST]` limits the cases per op
and mode in each dtype."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from glm_core.backends import triton_ops
from glm_core.backends.base import Backend
from glm_core.backends.cuda.kernels import share
from glm_core.conformance.case import Case, dtype_name, select
from glm_core.conformance.check import CaseFailure, judge

_converted = interpreter._convert_float


def to_nearest(x: Any, before: Any, after: Any, mode: Any) -> Any:
    """Makes Triton's interpreter round bfloat16 to nearest, as its compilers do. The interpreter
    (3.9) truncates, and its own rounding to nearest loses the carry into the exponent: 1.999
    becomes 1."""
    if (before, after) != (tl.float32, tl.bfloat16):
        return _converted(x, before, after, mode)
    wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = to_nearest


class InTriton(TorchDispatchMode):
    """Sends the operators of glm_core to the Triton kernels."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "glm_core":
            func = triton_ops.OPERATORS[func._opname]
        return func(*args, **(kwargs or {}))


def complaint(case: Case, backend: Backend) -> str:
    """Returns what is wrong, '' where the case passes."""
    try:
        return judge(case, backend).reason
    except CaseFailure as finding:
        return str(finding)
    except Exception as error:  # the interpreter's own errors among them
        return f"{type(error).__name__}: {error}"


def main(dtypes: str, most: str = "1000") -> None:
    """Leaves out the shapes of published models."""
    backend = Backend(name="triton", device_type="cpu", verified="executed on the CPU")
    share(backend)
    found: dict[str, str] = {}
    wanted = dtypes.split(",")
    taken: Counter[Any] = Counter()
    with InTriton():  # type: ignore[no-untyped-call]  # torch's own
        for case in select(backend, real=False):
            if case.op.name not in triton_ops.OPS or dtype_name(case.dtype) not in wanted:
                continue
            taken[case.op.name, case.mode, case.dtype] += 1
            if taken[case.op.name, case.mode, case.dtype] <= int(most) and not case.raises:
                found[case.id] = complaint(case, backend)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
