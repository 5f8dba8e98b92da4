"""Runs conformance of the onnxrt backend on one provider, in the environment that has it:
`python onnxrt_judge.py OpenVINOExecutionProvider float32 3` prints {case: "" or what is wrong}."""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.conformance.case import Case, CaseFailure, select
from glm_core.conformance.check import judge


def cases(backend: Backend, *dtypes: torch.dtype) -> list[Case]:
    """Leaves out the shapes of published models: this is about numbers, not about size."""
    return select(backend, modes=("test", "grad"), dtypes=dtypes, real=False)


def complaint(case: Case, backend: Backend) -> str:
    """Returns what is wrong, '' where the case passes."""
    try:
        return judge(case, backend).reason
    except CaseFailure as finding:
        return str(finding)
    except Exception as error:  # a refusal is an answer too
        return f"{type(error).__name__}: {error}"


def main(provider: str, dtype: str, most: str) -> None:
    """Returns the first `most` cases of every op and mode."""
    backend = registry.usable(f"onnxrt:{provider}")
    taken: Counter[tuple[str, str]] = Counter()
    found = {}
    for case in cases(backend, getattr(torch, dtype)):
        taken[case.op.name, case.mode] += 1
        if taken[case.op.name, case.mode] <= int(most):
            found[case.id] = complaint(case, backend)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
