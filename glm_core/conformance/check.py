"""What a case must show to pass: values, structure, untouched inputs, the same bits every time."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import Results, compute, named, oracle
from glm_core.conformance.tolerance import MAX_ERROR_RATIO, deviation


class CaseFailure(Exception):
    """Why a case fails, in one line."""


class Judged(NamedTuple):
    """A case that ran to its end: how wrong it was and, if too wrong, in which words."""

    error_ratio: float | None
    reason: str = ""


def judge(case: Case, backend: Backend) -> Judged:
    """Runs the case on the backend, strictly. Raises CaseFailure where anything but the size of the
    error is wrong, and whatever the kernel raises."""
    if case.raises:
        return _must_raise(case, backend)
    args = _arguments(case, backend)
    before = _snapshot(case, args)
    results = _run(case, backend, args)
    _check_structure(case, backend, results)
    if backend.device_type == "meta":
        return Judged(None)
    judged = _compare(case, results)
    _check_inputs(case, args, before)
    _check_memory(case, args, results)
    _check_repeats(case, backend, results)
    if case.plain and case.mode == "test":
        _check_poison(case, backend, math.nan)
        _check_poison(case, backend, math.inf)
    return judged


def _arguments(case: Case, backend: Backend, seed: int = 0) -> dict[str, Any]:
    return case.sample.make(case.dtype, backend.device(), seed)


def _run(case: Case, backend: Backend, args: Mapping[str, Any], spoil: bool = False) -> Results:
    """Results, read only after synchronize. `spoil` overwrites the inputs right behind the call,
    in the device's own order: a kernel on another stream reads them too late."""
    with use(backend, strict=True):
        results = compute(case, case.op, args)
        if spoil:
            for name, t in _inputs(case, args).items():
                if name.partition("[")[0] not in case.op.mutates:
                    t.detach().fill_(77 if t.is_floating_point() else 0)
        backend.synchronize()
    return results


def _inputs(case: Case, args: Mapping[str, Any]) -> Results:
    return {k: t for name, v in args.items() for k, t in named(name, v).items()}


def _check_structure(case: Case, backend: Backend, results: Results) -> None:
    expected = oracle(case).near[0]
    if list(results) != list(expected):
        raise CaseFailure(f"results {list(results)}; expected {list(expected)}")
    for name, got in results.items():
        want = expected[name]
        facts = {
            "shape": (tuple(want.shape), tuple(got.shape)),
            "dtype": (want.dtype, got.dtype),
            "device": (_device(case, backend, want).type, got.device.type),
            "contiguous": (True, got.is_contiguous() or not want.is_contiguous()),
        }
        for fact, (expect, received) in facts.items():
            if expect != received:
                raise CaseFailure(f"{name}: {fact} must be {expect}; received {received}")


def _device(case: Case, backend: Backend, like: Tensor) -> torch.device:
    """The backend's, unless no tensor argument says so (the norm of an empty list)."""
    args = case.sample.make(case.dtype)
    return backend.device() if _inputs(case, args) else like.device


def _compare(case: Case, results: Results) -> Judged:
    """The worst result against the oracle."""
    exact, near = oracle(case)
    worst = Judged(0.0)
    for name, got in results.items():
        found = deviation(got.cpu(), exact[name], [n[name] for n in near])
        if found.ratio > (worst.error_ratio or 0.0):
            worst = Judged(found.ratio, f"{name}: {found.where}")
    ratio = worst.error_ratio or 0.0
    if ratio <= MAX_ERROR_RATIO:
        return Judged(ratio)
    limit = f"{ratio:.3g} times what the reference in {case.dtype} is allowed, limit"
    return Judged(ratio, f"{worst.reason}, {limit} {MAX_ERROR_RATIO:g}")


def _bits(t: Tensor) -> Tensor:
    """The bytes of a tensor's whole storage: NaN equals itself, gaps of a view are included."""
    whole = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage())
    return whole.cpu().clone()


def _snapshot(case: Case, args: Mapping[str, Any]) -> Results:
    if any(t.is_meta for t in _inputs(case, args).values()):
        return {}
    fixed = {k: v for k, v in args.items() if k not in case.op.mutates}
    return {k: _bits(t) for k, t in _inputs(case, fixed).items()}


def _check_inputs(case: Case, args: Mapping[str, Any], before: Results) -> None:
    now = _inputs(case, args)
    for name, bits in before.items():
        if not torch.equal(_bits(now[name]), bits):
            may_change = ", ".join(case.op.mutates) or "none"
            raise CaseFailure(f"argument {name} was changed; only {may_change} may be")


def _check_memory(case: Case, args: Mapping[str, Any], results: Results) -> None:
    """Results are memory of their own, but for arguments declared to be written."""
    owned = {
        t.untyped_storage().data_ptr(): name
        for name, t in _inputs(case, args).items()
        if t.numel() and name.partition("[")[0] not in case.op.mutates
    }
    for name, t in results.items():
        if t.numel() and t.untyped_storage().data_ptr() in owned:
            where = owned[t.untyped_storage().data_ptr()]
            raise CaseFailure(f"{name} shares memory with argument {where}")


def _check_repeats(case: Case, backend: Backend, first: Results) -> None:
    """Another call leaves the first results alone, and the same call gives the same bits, also
    where its inputs are overwritten behind it."""
    kept = {k: t.clone() for k, t in first.items()}
    _run(case, backend, _arguments(case, backend, seed=1))
    _check_same("a later call overwrote this one's result", kept, first)
    if not backend.deterministic:
        return
    again = _run(case, backend, _arguments(case, backend))
    _check_same("a second run gives other bits, though deterministic is claimed", kept, again)
    spoil = case.mode == "test"  # a backward needs its inputs as they were
    late = _run(case, backend, _arguments(case, backend), spoil)
    overwritten = ", its inputs overwritten behind it," if spoil else ""
    _check_same(f"a third run{overwritten} gives other bits", kept, late)


def _check_same(fact: str, expected: Results, received: Results) -> None:
    for name, want in expected.items():
        if not torch.equal(_bits(want.flatten().clone()), _bits(received[name].flatten().clone())):
            raise CaseFailure(f"{name}: {fact}")


def _check_poison(case: Case, backend: Backend, poison: float) -> None:
    """One NaN, or one infinity, in each floating argument in turn shows in the same places as in
    the reference."""
    inputs = _inputs(case, case.sample.make(case.dtype))
    for name in (k for k, t in inputs.items() if t.is_floating_point() and t.numel()):
        for place in range(PLACES):
            want = compute(case, case.op.reference, _poisoned(case, "cpu", name, place, poison))
            if not all(t.isfinite().all() for t in want.values()):
                break
        else:
            continue  # the reference does not let it through
        got = _run(case, backend, _poisoned(case, backend.device(), name, place, poison))
        for result, expected in want.items():
            if not torch.equal(expected.isfinite(), got[result].cpu().isfinite()):
                fact = "non-finite results are not where the reference has them"
                raise CaseFailure(f"{result}: with {poison} in {name}, {fact}")


PLACES = 64
"""positions tried for a poisoned element until the reference's results show it"""


def _poisoned(
    case: Case, device: torch.device | str, name: str, place: int, poison: float
) -> dict[str, Any]:
    args = case.sample.make(case.dtype, device)
    tensor = _inputs(case, args)[name].view(-1)
    tensor[place * len(tensor) // PLACES] = poison
    return args


def _must_raise(case: Case, backend: Backend) -> Judged:
    if backend.device_type != "cpu":  # a device assertion would end this process's device context
        raises_alone(backend.name, case.id)
    elif not raises(case, backend):
        raise CaseFailure(_ACCEPTED)
    return Judged(None)


_ACCEPTED = "an index out of range gave a result; the reference raises an error"


def raises(case: Case, backend: Backend) -> bool:
    """Whether the case's call ends in an error."""
    try:
        _run(case, backend, _arguments(case, backend))
    except Exception:  # whichever error the backend's runtime has for it
        return True
    return False


def raises_alone(backend: str, id: str) -> None:
    """The same in a process of its own. Raises CaseFailure where there was no error, or a crash."""
    code = (
        "import sys\n"
        "from glm_core.backends.registry import usable\n"
        "from glm_core.conformance.case import select\n"
        "from glm_core.conformance.check import raises\n"
        "backend = usable(sys.argv[1]); [case] = select(backend, id=sys.argv[2])\n"
        "sys.exit(0 if raises(case, backend) else 1)"
    )
    command = [sys.executable, "-c", code, backend, id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 1:
        raise CaseFailure(_ACCEPTED)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CaseFailure(f"an index out of range ends the process ({done.returncode}): {last}")
