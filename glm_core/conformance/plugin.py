"""Offers the cases as parametrised pytest tests, for a vendor's own package:

    from glm_core.conformance.plugin import conformance

    @conformance("mydevice", known_failures="tests/xfails")
    def test_conformance(case):
        case.check()

A failed case is a failed test that prints the command which reruns it. An unsupported case is a
skip with the backend's own reason, a known failure is an xfail, and a stale known failure fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core.backends.base import Backend
from glm_core.backends.registry import get, probe
from glm_core.conformance.case import Case, every_case, select
from glm_core.conformance.known_failures import KnownFailure, load, unmatched
from glm_core.conformance.run import run_case


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One case on one backend, as a test parameter."""

    backend: Backend
    case: Case
    known: Sequence[KnownFailure]

    def check(self) -> None:
        """Passes, fails, skips or xfails the running test."""
        result = run_case(self.case, self.backend, self.known)
        if result.outcome == "fail":
            pytest.fail(f"{result.reason}\nrerun: {result.rerun}", pytrace=False)
        if result.outcome == "unsupported":
            pytest.skip(result.reason)
        if result.outcome == "xfail":
            pytest.xfail(result.reason)


@dataclasses.dataclass(frozen=True, slots=True)
class Stale:
    """A known failure that fits no case."""

    entry: KnownFailure

    def check(self) -> None:
        """Fails the running test."""
        fact = f"{self.entry.place}: known failure {self.entry.pattern!r} fits no case; remove it"
        pytest.fail(fact, pytrace=False)


def conformance(
    *backends: str,
    mode: str | Sequence[str] = ("test", "grad"),
    op: str | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    real: bool = False,
    skip: Sequence[str] = (),
    known_failures: Path | str | None = None,
) -> pytest.MarkDecorator:
    """Parametrises a test by `case`, with ids `BACKEND-CASE`. `known_failures` is a file, or a
    folder of `<backend>.txt`; `real` adds the large shapes of published models; `skip` leaves out
    the cases that fit one of its patterns. A backend that is not usable here becomes one skipped
    test with its reason."""
    filters = {
        "modes": (mode,) if isinstance(mode, str) else tuple(mode),
        "op": op,
        "dtypes": None if dtypes is None else tuple(dtypes),
        "real": real,
        "skip": tuple(skip),
    }
    parameters = [p for name in backends for p in _parameters(name, known_failures, filters)]
    return pytest.mark.parametrize("case", parameters)


def _parameters(name: str, folder: Path | str | None, filters: dict[str, Any]) -> Iterator[Any]:
    state = probe(name)
    if not state.ok:
        yield pytest.param(None, marks=pytest.mark.skip(reason=state.reason), id=name)
        return
    backend = get(name)
    known = load(_file(folder, name))
    for case in select(backend, **filters):
        yield pytest.param(Check(backend, case, known), id=f"{name}-{case.id}")
    for entry in unmatched(known, [c.id for c in every_case(backend)] if known else []):
        yield pytest.param(Stale(entry), id=f"{name}-stale-{entry.pattern}")


def _file(known_failures: Path | str | None, name: str) -> Path | None:
    if known_failures is None:
        return None
    path = Path(known_failures)
    return path / f"{name.partition(':')[0]}.txt" if path.is_dir() else path
