"""Defines the case: an op, a sample, a dtype and a mode. Test, grad, perf and support all start
from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.errors import GlmCoreError, unknown
from glm_core.ops import all_ops
from glm_core.ops.layout import far
from glm_core.spec import Draw, Maker, Sample, realize

MODES = ("test", "grad", "perf", "support")


class CaseFailure(Exception):
    """The reason why a case fails, in one line."""


INDEXES = {"embedding": ("ids", "weight"), "linear_cross_entropy": ("labels", "weight")}
"""by op: the argument that holds indexes, and the argument whose rows they index. An index out of
range must raise an error"""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One call of one op: what to run and in which mode."""

    op: Op
    sample: Sample
    dtype: torch.dtype
    mode: str
    plain: bool = False
    """whether this is the op's first sample, which is also tested with NaN and infinity"""
    raises: bool = False
    """whether an index is out of range, so that the call must raise an error"""

    @property
    def id(self) -> str:
        """Returns the id, which is also the filter on the command line:
        `rms_norm-bfloat16-2x5x96-grad`."""
        return f"{self.op.name}-{dtype_name(self.dtype)}-{self.sample.id}-{self.mode}"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def every_case(backend: Backend, only: str | None = None) -> Iterator[Case]:
    """Yields the cases of all ops, or of one, in every dtype the backend claims and every mode that
    applies."""
    for op in all_ops().values() if only is None else (all_ops()[only],):
        samples = list(op.samples())
        for mode in MODES:
            for dtype in backend.dtypes:
                for sample in samples:
                    if _applies(op, sample, mode):
                        yield Case(op, sample, dtype, mode, plain=sample is samples[0])
            if mode in ("test", "grad") and backend.device_type != "meta":
                for sample in _far(op, samples[0]):
                    if _applies(op, sample, mode):
                        yield Case(op, sample, _smallest(backend.dtypes), mode)
            if mode == "test" and backend.device_type != "meta":
                for sample in _out_of_range(op, samples[0]):
                    yield Case(op, sample, backend.dtypes[0], mode, raises=True)


def _applies(op: Op, sample: Sample, mode: str) -> bool:
    if mode == "grad":
        return bool(op.differentiable)
    return sample.real if mode == "perf" else True


def _far(op: Op, sample: Sample) -> Iterator[Sample]:
    """Yields the sample with its first differentiable argument past 2^31 elements, if it has
    rows."""
    for name in op.differentiable[:1]:
        if (shape := sample.make(torch.float32, "meta")[name].shape)[:-1] and shape[0] > 1:
            yield Sample(f"{sample.id}-{name}-far", far(sample.args, name), large=True)


def _smallest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _out_of_range(op: Op, sample: Sample) -> Iterator[Sample]:
    if op.name not in INDEXES:
        return
    index, table = INDEXES[op.name]
    for name, at_end in (("past-end", True), ("negative", False)):
        wrong = _wrong_index(sample.args[index], sample.args[table], at_end)
        yield Sample(f"{sample.id}-{index}-{name}", {**sample.args, index: wrong})


def _wrong_index(index: Maker, table: Maker, at_end: bool) -> Maker:
    def make(draw: Draw) -> Tensor:
        ids: Tensor = realize(index, draw).clone()
        ids.view(-1)[-1] = len(realize(table, draw)) if at_end else -1
        return ids

    return make


def select(
    backend: Backend,
    *,
    modes: Sequence[str] = ("test", "grad"),
    op: str | None = None,
    id: str | None = None,
    skip: Sequence[str] = (),
    dtypes: Iterable[torch.dtype] | None = None,
    real: bool = True,
) -> list[Case]:
    """Returns the cases that match every filter. `id` and `skip` are case ids, or patterns with *;
    `skip` leaves cases out. An `id` that ends in a mode overrides `modes`. `real=False` leaves out
    the large shapes and those of published models. Raises GlmCoreError for a mode, op or id that
    does not exist, and for a `skip` that leaves nothing out."""
    _check_names("mode", modes, MODES)
    _check_names("op", [op] if op else [], all_ops())
    wanted = None if dtypes is None else set(dtypes)
    selected = [
        case
        for case in every_case(backend, op)
        if matches(case.id, modes, op, id)
        and (wanted is None or case.dtype in wanted)
        and (real or not (case.sample.real or case.sample.large))
    ]
    if id and not selected:
        raise GlmCoreError(_no_such_case(backend, id))
    kept = set(without([case.id for case in selected], skip))
    return [case for case in selected if case.id in kept]


def matches(case: str, modes: Sequence[str], op: str | None, id: str | None) -> bool:
    """Returns whether the case with this id is wanted. A pattern such as `x*` does not fetch perf
    and support cases along; `x*-perf` does."""
    mode = case.rpartition("-")[2]
    named = id is not None and id.rpartition("-")[2] in MODES
    fits = id is None or fnmatchcase(case, id)
    return fits and (named or mode in modes) and op in (None, case.partition("-")[0])


def without(ids: list[str], skip: Sequence[str]) -> list[str]:
    """Returns the ids that fit none of the patterns. Raises GlmCoreError for a pattern that fits no
    id."""
    for pattern in skip:
        if not any(fnmatchcase(id, pattern) for id in ids):
            raise GlmCoreError(
                f"skip {pattern!r}: fits none of the {len(ids)} chosen cases; leave it out, or "
                "pass a case's id, in which * stands for anything"
            )
    return [id for id in ids if not any(fnmatchcase(id, pattern) for pattern in skip)]


def _check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise GlmCoreError(unknown(kind, name, known))


def _no_such_case(backend: Backend, id: str) -> str:
    ids = [case.id for case in every_case(backend)]
    _, _, hint = unknown("case", id, ids).partition(" (")
    hint = f" ({hint}" if hint else ""
    return f"unknown case {id!r} of backend {backend.name}: none of its {len(ids)} ids fits{hint}"
