"""Runs conformance of the GPU kernels executed on the CPU, one fiber per thread: `python
fibers_judge.py LIBRARY SEED PATTERN 32:float32 64:bfloat16` prints {case: "" or what is wrong} and
how often each kernel ran. With LIBRARY@BUG@BUG... it does so for each planted bug, by its number,
in a fork, and prints a list; where AddressSanitizer ends the fork, its report. A process of its
own: the library is instrumented, and AddressSanitizer must come first."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from forked import work_and_exit

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.cuda.kernels import linear_few, share
from glm_core.conformance.case import Case, CaseFailure, dtype_name, select
from glm_core.conformance.check import judge
from glm_core.conformance.oracle import EagerMode

OPERATORS = torch.ops.glm_core
DEVICE_HALVES = (
    "norm_forward",
    "norm_backward",
    "activation_forward",
    "activation_backward",
    "rope_turn",
    "embedding_forward",
    "embedding_backward",
    "linear_cross_entropy_forward",
    "global_norm",
    "adamw_",
    "linear_few",
    "quantized_linear_forward",
    "quantized_linear_backward",
)
LEAVES = tuple(name for name in DEVICE_HALVES if hasattr(OPERATORS, name))
"""the operators that have kernels; the others call these"""


LARGEST = ("64x1000", "70x24-1031", "7x328-33-int8-a8", "adamw-float16-mixed")
"""shapes that take half of all the time, for nothing that depends on the dtype"""


class OnFibers(EagerMode):
    """Sends the operators of glm_core to the library's kernels and counts them."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self.calls = dict.fromkeys(LEAVES, 0)
        self.define = torch.library.Library("glm_core_fibers", "DEF")
        for name in LEAVES:
            schema = str(getattr(OPERATORS, name).default._schema)
            self.define.define(schema.removeprefix("glm_core::"))
        torch.ops.load_library(library)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "glm_core":
            name = func._opname
            if name not in self.calls:  # made of others, which it calls; seen in inference mode
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            self.calls[name] += 1
            func = getattr(torch.ops.glm_core_fibers, name).default
        return func(*args, **(kwargs or {}))


def complaint(case: Case, backend: Backend) -> str:
    """Returns what is wrong, '' where the case passes."""
    try:
        return judge(case, backend).reason
    except CaseFailure as finding:
        return str(finding)
    except Exception as error:  # the scheduler's own findings among them
        return f"{type(error).__name__}: {error}"


def cases(backend: Backend, pattern: str, dtypes: set[str]) -> list[Case]:
    """Returns the kernels' own cases in these dtypes, without the shapes of published models."""
    return [
        case
        for case in select(backend, id=pattern, real=False)
        if case.op.name in backend.kernels
        and case.mode in ("test", "grad")
        and dtype_name(case.dtype) in dtypes
    ]


def sharing_errors() -> dict[str, str]:
    """Compares, bit for bit, products of rows that share reads of a weight with those of each row
    alone, whose cases conformance judges."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 512, generator=g).half()
    codes = torch.randint(-128, 128, (19, 512), generator=g).to(torch.int8)
    scale, bias = torch.rand(19, 16, generator=g).half(), torch.randn(19, generator=g).half()
    weight, few, many = codes.half() * scale[:, :1], (2, 3, 8, 16), (8, 11, 25, 50)
    quantized, errors = OPERATORS.quantized_linear_forward, {}
    for name, rows, product in (
        ("float16", few, lambda r: OPERATORS.linear_few(r, weight, bias)),
        ("int8-group32", few, lambda r: quantized(r, codes, scale, bias, 8, 16)),
        ("int4-group32", few, lambda r: quantized(r, codes[:, :256], scale, bias, 4, 16)),
        ("int8-group64", many, lambda r: quantized(r, codes, scale[:, :8], bias, 8, 16)),
        ("int4-group128", many, lambda r: quantized(r, codes[:, :256], scale[:, :4], bias, 4, 16)),
    ):
        alone = torch.cat([product(row[None]) for row in x[: rows[-1]]])
        wrong = [n for n in rows if not torch.equal(product(x[:n]), alone[:n])]
        errors[f"{name}-shared"] = f"rows {wrong} differ from each alone" if wrong else ""
    converted = quantized(x, codes[:, :256], scale, bias, 4, 16)  # many rows in small groups
    alone = torch.cat([quantized(row[None], codes[:, :256], scale, bias, 4, 16) for row in x])
    off = float((converted - alone).abs().max() / alone.abs().max())
    limit = 4 * torch.finfo(x.dtype).eps
    errors["int4-converted"] = "" if off <= limit else f"off by {off:.1e} of the largest"
    return errors


def judged(library: str, seed: str, pattern: str, *runs: str) -> dict[str, Any]:
    """Judges each run: WAVE:DTYPE,DTYPE or, to limit the cases of an op and mode, WAVE:DTYPE:MOST,
    which leaves out the largest too."""
    backend = Backend(name="fibers", device_type="cpu", verified="executed on the CPU")
    share(backend)
    backend.implements(ops.linear)(linear_few)
    mode, scheduler = OnFibers(library), ctypes.CDLL(library)
    found: dict[str, str] = {}
    for run in runs:
        wave, dtypes, *most = run.split(":")
        left = Counter[tuple[str, str]]()
        scheduler.glm_fibers_configure(int(wave), ctypes.c_uint64(int(seed)))
        with mode:
            for case in cases(backend, pattern, set(dtypes.split(","))):
                sums = case.op.name.startswith("add_")  # whose kernel is the norm's
                largest = any(shape in case.id for shape in LARGEST)
                if largest and (most or sums or case.mode == "test"):  # gradients need results
                    continue
                left[case.op.name, case.mode] += 1
                if left[case.op.name, case.mode] <= int(most[0] if most else 5 if sums else 1000):
                    found[f"wave{wave}-{case.id}"] = complaint(case, backend)
            shared = wave == "32" and fnmatch("quantized_linear-shared", pattern)
            if shared and "wave32-int4-converted" not in found:
                found |= {f"wave{wave}-{id}": what for id, what in sharing_errors().items()}
    return {"found": found, "calls": mode.calls}


def forked(bug: str, *words: str) -> dict[str, Any]:
    """Judges with a planted bug in a fork of this process, which some bugs end."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer"), Path(folder, "log")
        if not (pid := os.fork()):
            os.environ["PLANTED"] = bug  # which the library reads once
            work_and_exit(log, lambda: answer.write_text(json.dumps(judged(*words))))
        os.waitpid(pid, 0)
        ended = {"found": {"ended": log.read_text()}}
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else ended
        return found


def main(library: str, *words: str) -> None:
    path, *bugs = library.split("@")
    answers = [forked(bug, path, *words) for bug in bugs]
    json.dump(answers if bugs else judged(path, *words), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
