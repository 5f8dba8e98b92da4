"""Every plan trains as one process does: losses, gradient norms, gathered gradients and weights lie
within what honest rounding explains, on 2 and 4 processes that see different rows; and known
mistakes of parallel training do not.

Prints a table of ratios to the bound (`-s`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import workers
from cases import HONEST, PLANTED, Case
from plans import lack, needs

from glm_core.sensitivity.plans import baseline, jobs

T = TypeVar("T")
pytestmark = pytest.mark.timeout(600)  # the first test of a job waits for all of it


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of xdist's workers have in common."""
    return workers.common(tmp_path_factory)


READ: dict[Path, Any] = {}
"""what this process has read of the shared folder"""


def once(path: Path, make: Callable[[], T]) -> T:
    """Returns what `make` returns. The first process that needs it makes it, each reads it once."""
    if path not in READ:
        with workers.locked(path):
            if not path.exists():
                torch.save(make(), path)
            READ[path] = torch.load(path, weights_only=False)
    made: T = READ[path]
    return made


@pytest.fixture
def told(request: pytest.FixtureRequest, shared: Path, case: Case) -> list[dict[str, Any]]:
    """What the processes of the case's job tell of it, by rank. A job trains all chosen cases of
    its size."""
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    mine = [c for c in chosen if c.world == case.world and not lack(c.plan)]
    work = shared / f"job-{case.world}"
    job = once(work.with_suffix(".pt"), lambda: jobs.run(mine, case.world, work))
    found = job[mine.index(case)]
    if errors := [t["error"] for t in found if "error" in t]:
        pytest.fail(errors[-1])
    if not all(found):
        pytest.fail("an earlier case of this job failed, or it ran out of time")
    return found


def verdict(case: Case, told: list[dict[str, Any]], shared: Path) -> tuple[dict[str, float], float]:
    """Ratios to the bounds, and how far two copies of a weight or a gradient are apart."""
    name = f"baseline-{case.model}-{case.dtype}.pt"
    base = once(shared / name, lambda: baseline.make(case.model, case.dtype))
    shapes = {n: w.shape for n, w in base.weights.items()}
    grads, apart = jobs.gathered([p for t in told for p in t["gradient"]], shapes)
    weights, later = jobs.gathered([p for t in told for p in t["weight"]], shapes)
    ratios = base.ratios(told[0], grads, weights)
    shown = "  ".join(f"{n} {r:8.3f}" for n, r in ratios.items())
    print(f"\n{case!s:110} {shown}")
    return ratios, max(apart, later)


def marked(cases: list[Case]) -> list[Any]:
    """The cases, each with its id and the torch that it needs."""
    return [pytest.param(case, id=str(case), marks=needs(case.plan)) for case in cases]


@pytest.mark.parametrize("case", marked(HONEST))
def test_a_plan_trains_as_one_process(case: Case, told: list[dict[str, Any]], shared: Path) -> None:
    ratios, apart = verdict(case, told, shared)
    assert max(ratios.values()) <= 1, ratios
    assert apart == 0, "copies of a tensor differ between processes"
    assert all(t["loss"] == told[0]["loss"] and t["norm"] == told[0]["norm"] for t in told)
    load = READ[shared / f"baseline-{case.model}-{case.dtype}.pt"].load
    assert all(t["load"] == load for t in told), "loads of experts of all layers, on every rank"


@pytest.mark.parametrize("case", marked(PLANTED))
def test_a_planted_mistake_is_found(case: Case, told: list[dict[str, Any]], shared: Path) -> None:
    ratios, _ = verdict(case, told, shared)
    assert max(ratios.values()) > 2, ratios
