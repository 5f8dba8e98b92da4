"""Judges one case: the values, the structure of the results, that inputs are left alone, and that
every run gives the same bits."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance import autograd, choices
from glm_core.conformance.case import Case, CaseFailure
from glm_core.conformance.oracle import Results, compute, oracle, oracle_of, tensors_by_name
from glm_core.conformance.tolerance import MAX_ERROR_RATIO, deviation
from glm_core.ops.layout import FAR


class Judgement(NamedTuple):
    """The outcome of a case that ran to its end."""

    error_ratio: float | None
    """largest error, in units of the error that the reference may have; None for a meta backend and
    for a case that must raise an error"""
    reason: str = ""
    """where the error was too large, in words; empty where it was not"""

    @property
    def passed(self) -> bool:
        """Returns whether the error is within what is allowed."""
        return (self.error_ratio or 0.0) <= MAX_ERROR_RATIO


Keep = Callable[[Case, Results], None]
"""called with the results of a case as soon as they are computed, before they are judged"""


def judge(
    case: Case,
    backend: Backend,
    keep: Keep | None = None,
    args: Mapping[str, Any] | None = None,
    values_only: bool = False,
) -> Judgement:
    """Runs the case on the backend, strictly: without fallback to the reference. `args` are the
    case's arguments where they were made already; `values_only` leaves out every check but that of
    the results. Raises CaseFailure where anything but the size of the error is wrong, and whatever
    the kernel itself raises."""
    if case.raises:
        return _must_raise(case, backend)
    args = args or _arguments(case, backend)
    before = _snapshot(case, args)
    results = _run(case, backend, args)
    if keep is not None:
        keep(case, results)
    _check_structure(case, backend, args, results)
    if backend.device_type == "meta":
        return Judgement(None)
    judgement = compare(case, results)
    if values_only:
        return judgement
    _check_inputs(case, args, before)
    _check_memory(case, args, results)
    _check_repeats(case, backend, args, results)
    if case.plain and case.mode == "test" and judgement.passed:
        _check_poison(case, backend, math.nan)
        _check_poison(case, backend, math.inf)
        autograd.check_inference(case, backend)
    large = case.sample.real or case.sample.large
    if case.mode == "grad" and not large and judgement.passed:
        autograd.check(case, backend)
    return judgement


def _arguments(case: Case, backend: Backend, seed: int = 0) -> dict[str, Any]:
    return case.sample.make(case.dtype, backend.device(), seed)


def _run(case: Case, backend: Backend, args: Mapping[str, Any], spoil: bool = False) -> Results:
    """Runs the case's op and synchronizes. `spoil` queues an overwrite of the inputs right behind
    the call, which shows a kernel that reads them too late, from another stream."""
    with use(backend, strict=True):
        results = compute(case, case.op, args)
        if spoil:
            for name, t in _inputs(case, args).items():
                if name.partition("[")[0] not in case.op.mutates:
                    t.detach().fill_(77 if t.is_floating_point() else 0)
        backend.synchronize()
    return results


def _inputs(case: Case, args: Mapping[str, Any]) -> Results:
    return {k: t for name, v in args.items() for k, t in tensors_by_name(name, v).items()}


def _check_structure(
    case: Case, backend: Backend, args: Mapping[str, Any], results: Results
) -> None:
    """Fails where the results have other names, shapes, dtypes or devices than the reference's. A
    call without tensor arguments (the norm of an empty list) may give its result anywhere."""
    expected = {name: allowed.plain for name, allowed in oracle(case).items()}
    check_names(expected, results)
    inputs = _inputs(case, args)
    device = backend.device() if inputs else None
    for name, got in results.items():
        want = expected[name]
        # the gradient of an argument may lie in memory as the argument does
        own = inputs.get(name.removeprefix("d "), want)
        contiguous = got.is_contiguous() or not (want.is_contiguous() and own.is_contiguous())
        check_tensor(name, want, got)
        _check_fact(name, "device", (device or want.device).type, got.device.type)
        _check_fact(name, "contiguous", True, contiguous)


def check_names(expected: Results, results: Results) -> None:
    """Raises CaseFailure where there are other results than expected."""
    if sorted(results) != sorted(expected):
        raise CaseFailure(f"results {list(results)}; expected {list(expected)}")


def check_tensor(name: str, expected: Tensor, result: Tensor) -> None:
    """Raises CaseFailure where a result has the wrong shape or dtype."""
    _check_fact(name, "shape", tuple(expected.shape), tuple(result.shape))
    _check_fact(name, "dtype", expected.dtype, result.dtype)


def _check_fact(name: str, fact: str, expected: object, received: object) -> None:
    if expected != received:
        raise CaseFailure(f"{name}: {fact} must be {expected}; received {received}")


def compare(case: Case, results: Results) -> Judgement:
    """Compares every result with the oracle and returns the worst."""
    worst, allowed = Judgement(0.0), oracle_of(case, results)
    for name, got in results.items():
        difference = choices.deviation(case, name, got.cpu()) or deviation(got.cpu(), allowed[name])
        if difference.ratio > (worst.error_ratio or 0.0):
            worst = Judgement(difference.ratio, f"{name}: {difference.where}")
    ratio = worst.error_ratio or 0.0
    if ratio <= MAX_ERROR_RATIO:
        return Judgement(ratio)
    limit = f"{ratio:.3g} times what the reference in {case.dtype} is allowed, limit"
    return Judgement(ratio, f"{worst.reason}, {limit} {MAX_ERROR_RATIO:g}")


def _bits(t: Tensor) -> Tensor:
    """Returns the bytes of a tensor's whole storage, in which NaN equals itself and the gaps of a
    view are included; where the gaps are past 2^31 elements, those of its elements."""
    if t.untyped_storage().nbytes() > FAR:
        return _bytes(t).cpu()
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
    """Fails where a result shares memory with an argument that the op does not declare as
    written."""
    owned = {
        t.untyped_storage().data_ptr(): name
        for name, t in _inputs(case, args).items()
        if t.numel() and name.partition("[")[0] not in case.op.mutates
    }
    for name, t in results.items():
        if t.numel() and t.untyped_storage().data_ptr() in owned:
            where = owned[t.untyped_storage().data_ptr()]
            raise CaseFailure(f"{name} shares memory with argument {where}")


def _check_repeats(case: Case, backend: Backend, args: Mapping[str, Any], first: Results) -> None:
    """Fails where another call changes the first results, or where the same call gives other bits;
    its inputs are overwritten right behind it."""

    def again() -> Mapping[str, Any]:
        return _arguments(case, backend) if case.op.mutates else args

    copies = {k: t.clone() for k, t in first.items()}
    _run(case, backend, _arguments(case, backend, seed=1))
    _check_same("a later call overwrote this one's result", copies, first)
    if not backend.deterministic:
        return
    second = _run(case, backend, again())
    _check_same("a second run gives other bits, though deterministic is claimed", copies, second)
    spoil = case.mode == "test"  # a backward needs its inputs as they were
    third = _run(case, backend, again(), spoil)
    overwritten = ", its inputs overwritten behind it," if spoil else ""
    _check_same(f"a third run{overwritten} gives other bits", copies, third)


def _check_same(fact: str, expected: Results, received: Results) -> None:
    for name, want in expected.items():
        if not torch.equal(_bytes(want), _bytes(received[name])):
            raise CaseFailure(f"{name}: {fact}")


def _bytes(x: Tensor) -> Tensor:
    """Returns the bytes of the elements, in which NaN equals itself."""
    packed = x.detach().clone(memory_format=torch.contiguous_format)
    return packed.reshape(-1).view(torch.uint8)


def _check_poison(case: Case, backend: Backend, poison: float) -> None:
    """Puts one NaN or infinity into each floating-point argument in turn. Fails where the results
    are not finite in other places than the reference's."""
    inputs = _inputs(case, case.sample.make(case.dtype))
    for name in (k for k, t in inputs.items() if t.is_floating_point() and t.numel()):
        for place in range(PLACES):
            want = compute(case, case.op.reference, _poisoned(case, "cpu", name, place, poison))
            if not all(t.isfinite().all() for t in want.values()):
                break
        else:
            continue  # the reference's results stay finite
        got = _run(case, backend, _poisoned(case, backend.device(), name, place, poison))
        for result, expected in want.items():
            if not torch.equal(expected.isfinite(), got[result].cpu().isfinite()):
                fact = "non-finite results are not where the reference has them"
                raise CaseFailure(f"{result}: with {poison} in {name}, {fact}")


PLACES = 64
"""so many positions of the poisoned element are tried until the reference's results show it"""


def _poisoned(
    case: Case, device: torch.device | str, name: str, place: int, poison: float
) -> dict[str, Any]:
    args = case.sample.make(case.dtype, device)
    tensor = _inputs(case, args)[name].view(-1)
    tensor[place * len(tensor) // PLACES] = poison
    return args


def _must_raise(case: Case, backend: Backend) -> Judgement:
    if backend.device_type != "cpu":  # a device assertion would end this process's device context
        check_raises_alone(backend.name, case.id)
    elif not raises(case, backend):
        raise CaseFailure(_ACCEPTED)
    return Judgement(None)


_ACCEPTED = "an index out of range gave a result; the reference raises an error"


def raises(case: Case, backend: Backend) -> bool:
    """Does the case's call end in an error?"""
    try:
        _run(case, backend, _arguments(case, backend))
    except Exception:  # whichever error the backend's runtime has for it
        return True
    return False


def check_raises_alone(backend: str, id: str) -> None:
    """Runs the case's call in a process of its own. Raises CaseFailure where it does not end in an
    error, or where the process crashes."""
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
