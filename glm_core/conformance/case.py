"""One case: an op, a sample, a dtype and a mode. Test, grad, perf and support all start from it."""

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
from glm_core.spec import Draw, Maker, Sample, realize

MODES = ("test", "grad", "perf", "support")

INDEXES = {"embedding": ("ids", "weight"), "linear_cross_entropy": ("labels", "weight")}
"""op: (argument that indexes, argument whose rows it indexes); an index out of range is an error"""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What to run and in which mode; the same object whichever the mode."""

    op: Op
    sample: Sample
    dtype: torch.dtype
    mode: str
    plain: bool = False
    """the op's first sample, which is asked for NaN and Inf propagation too"""
    raises: bool = False
    """an index is out of range: anything but an error is a failure"""

    @property
    def id(self) -> str:
        """`rms_norm-bfloat16-2x5x96-grad`; the filter on the command line."""
        return f"{self.op.name}-{dtype_name(self.dtype)}-{self.sample.id}-{self.mode}"


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def every_case(backend: Backend) -> Iterator[Case]:
    """All cases of all ops in every dtype the backend claims and every mode that has a meaning."""
    for op in all_ops().values():
        samples = list(op.samples())
        for mode in MODES:
            for dtype in backend.dtypes:
                for sample in samples:
                    if _meaningful(op, sample, mode):
                        yield Case(op, sample, dtype, mode, plain=sample is samples[0])
            if mode == "test" and backend.device_type != "meta":
                for sample in _out_of_range(op, samples[0]):
                    yield Case(op, sample, backend.dtypes[0], mode, raises=True)


def _meaningful(op: Op, sample: Sample, mode: str) -> bool:
    if mode == "grad":
        return bool(op.differentiable)
    return sample.real if mode == "perf" else True


def _out_of_range(op: Op, sample: Sample) -> Iterator[Sample]:
    if op.name not in INDEXES:
        return
    index, table = INDEXES[op.name]
    for name, at_end in (("past-end", True), ("negative", False)):
        spoiled = _spoiled(sample.args[index], sample.args[table], at_end)
        yield Sample(f"{sample.id}-{index}-{name}", {**sample.args, index: spoiled})


def _spoiled(index: Maker, table: Maker, at_end: bool) -> Maker:
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
    dtypes: Iterable[torch.dtype] | None = None,
    real: bool = True,
) -> list[Case]:
    """The cases that fit every filter. `id` is an id or a pattern with * and picks its own mode;
    `real=False` leaves out the shapes of published models. Raises GlmCoreError where a filter
    names nothing that exists."""
    _check_names("mode", modes, MODES)
    _check_names("op", [op] if op else [], all_ops())
    wanted = None if dtypes is None else set(dtypes)
    found = [
        case
        for case in every_case(backend)
        if (fnmatchcase(case.id, id) if id else case.mode in modes)
        and op in (None, case.op.name)
        and (wanted is None or case.dtype in wanted)
        and (real or not case.sample.real)
    ]
    if id and not found:
        raise GlmCoreError(_no_such_case(backend, id))
    return found


def _check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise GlmCoreError(unknown(kind, name, known))


def _no_such_case(backend: Backend, id: str) -> str:
    ids = [case.id for case in every_case(backend)]
    _, _, hint = unknown("case", id, ids).partition(" (")
    hint = f" ({hint}" if hint else ""
    return f"unknown case {id!r} of backend {backend.name}: none of its {len(ids)} ids fits{hint}"
