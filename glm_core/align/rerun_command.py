"""The command that shows one guilty case again: a conformance case where there is one, else the
captured call itself."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from glm_core.align.capture import Call
from glm_core.align.verdict import Finding
from glm_core.backends.base import Backend
from glm_core.config import RunConfig, to_dict
from glm_core.conformance.case import select
from glm_core.conformance.run import run_case
from glm_core.model.presets import preset


@dataclasses.dataclass(frozen=True, slots=True)
class CallFilter:
    """Which captured calls; empty fields fit any."""

    op: str = ""
    direction: str = ""
    layer: str = ""
    step: int = 0

    def fits(self, call: Call) -> bool:
        """Is it one of them? (A call has all its directions.)"""
        pairs = ((self.op, call.op.name), (self.layer, call.layer), (self.step, call.step))
        return all(not wanted or wanted == own for wanted, own in pairs)

    def words(self) -> list[str]:
        """As options of `glm-core align bisect`."""
        given = dataclasses.asdict(self).items()
        return [word for name, value in given if value for word in (f"--{name}", str(value))]

    def __str__(self) -> str:
        return " ".join(self.words()) or "any call"


ANY_CALL = CallFilter()


class Again(NamedTuple):
    """The command, and what it cannot show."""

    command: str
    note: str = ""


def command(config: RunConfig, backend: str, options: Sequence[str] | None = None) -> list[str]:
    """`glm-core align bisect` for this run, in words."""
    if options is None:
        base = to_dict(RunConfig(model=preset("tiny")))
        options = [
            word
            for table, values in to_dict(config).items()
            for key, value in values.items()
            if value != base[table][key] and key not in ("backend", "dtype")
            for word in ("--set", f"{table}.{key}={json.dumps(value, ensure_ascii=False)}")
        ]
    run = ["--backend", backend, "--dtype", config.train.dtype]
    return ["glm-core", "align", "bisect", *options, *run]


def join(words: list[str], only: CallFilter) -> str:
    """For a shell."""
    return shlex.join([*words, *only.words()])


def find(
    backend: Backend,
    finding: Finding,
    direction: str,
    dtype: str,
    judge: Callable[[Backend, CallFilter], list[Finding]],
    words: list[str],
) -> Again:
    """The first of these that fails when it is tried: a conformance case of the op in this dtype
    and direction, the captured call, all captured calls of the op, the whole bisection."""
    mode = "grad" if direction == "backward" else "test"
    working = {getattr(torch, dtype)} & set(backend.dtypes)
    for case in select(backend, modes=(mode,), op=finding.op, dtypes=working, real=False):
        result = run_case(case, backend)
        if result.outcome == "fail":
            return Again(result.rerun)
    places = [CallFilter(finding.op, direction)]
    if finding.call >= 0:
        places.insert(0, CallFilter(finding.op, direction, finding.layer, finding.step))
    for place in places:
        if any(f.ratio > 1 for f in judge(backend, place)):
            return Again(join(words, place))
    note = "that op alone is right when it is repeated: the fault was a passing one, or it needs "
    return Again(join(words, ANY_CALL), note + "the calls before it")
