"""Every usable backend is judged against the float64 reference, on all samples except the shapes of
published models. The ids are the filter: pytest -k cpu-rms_norm-bfloat16-2x5x96-grad."""

from __future__ import annotations

from pathlib import Path

import torch

from glm_core.conformance.plugin import Check, conformance

XFAILS = Path(__file__).parent / "xfails"


@conformance("reference", "null", dtypes=[torch.float32], known_failures=XFAILS)
def test_references_only(case: Check) -> None:
    case.check()


@conformance("cpu", known_failures=XFAILS)
def test_cpu(case: Check) -> None:
    case.check()


@conformance("onnxrt", dtypes=[torch.float32, torch.bfloat16], known_failures=XFAILS)
def test_onnxrt(case: Check) -> None:
    case.check()
