"""The compiled kernels: every conformance case with every instruction set; results that do not
depend on the number of threads; operators that torch can trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends import cpu
from glm_core.backends.registry import probe, use
from glm_core.conformance.case import Case, every_case
from glm_core.conformance.check import judge
from glm_core.conformance.oracle import compute

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)

CASES = [
    c
    for c in every_case(cpu.backend)
    if c.mode in ("test", "grad") and c.op.name in cpu.backend.kernels
]
ISAS = cpu.isas() if probe("cpu").ok else []


@pytest.fixture
def any_isa() -> Iterator[Callable[[str], None]]:
    """Selects an instruction set for one test."""
    before = cpu.isa()
    yield cpu.select_isa
    cpu.select_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_instruction_set_conforms(case: Case, any_isa: Callable[[str], None]) -> None:
    wrong = {}
    for isa in ISAS:
        any_isa(isa)
        if reason := judge(case, cpu.backend).reason:
            wrong[isa] = reason
    assert not wrong


@pytest.mark.parametrize(
    "case",
    # linear is torch's own product, whose order of summation is torch's business
    [c for c in CASES if c.op.name != "linear" and not c.raises],
    ids=lambda c: c.id,
)
def test_results_do_not_depend_on_threads(case: Case, threads: Callable[[int], None]) -> None:
    seen = []
    for n in (1, 2):
        threads(n)
        with use("cpu", strict=True):
            seen.append(compute(case, case.op, case.sample.make(case.dtype)))
    for name in seen[0]:
        assert torch.equal(seen[0][name], seen[1][name]), name
