"""Builds the command that reruns one guilty case: a conformance case where one fails, else the
captured call itself."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from glm_core.align import main_job
from glm_core.align.capture import Call
from glm_core.align.verdict import Finding
from glm_core.backends.base import Backend
from glm_core.config import RunConfig, to_dict
from glm_core.conformance.case import select
from glm_core.conformance.run import run_case


@dataclasses.dataclass(frozen=True, slots=True)
class CallFilter:
    """Selects captured calls; an empty field matches any."""

    op: str = ""
    direction: str = ""
    layer: str = ""
    step: int = 0

    def fits(self, call: Call) -> bool:
        """Is the call selected? The direction is not looked at: a call has all of them."""
        pairs = ((self.op, call.op.name), (self.layer, call.layer), (self.step, call.step))
        return all(not wanted or wanted == own for wanted, own in pairs)

    def words(self) -> list[str]:
        """Returns the filter as options of `glm-core align bisect`."""
        fields = dataclasses.asdict(self).items()
        return [word for name, value in fields if value for word in (f"--{name}", str(value))]

    def __str__(self) -> str:
        return " ".join(self.words()) or "any call"


ANY_CALL = CallFilter()


class Rerun(NamedTuple):
    """The command that reruns a case, and what it cannot show."""

    command: str
    note: str = ""


def command(config: RunConfig, backend: str, options: Sequence[str] | None = None) -> list[str]:
    """Returns `glm-core align bisect` for this run as a list of words. `options` describe the run;
    the default is every field that is not the main job's."""
    if options is None:
        base = to_dict(main_job())
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
    """Returns the command for this filter as one line for a shell."""
    return shlex.join([*words, *only.words()])


def find(
    backend: Backend,
    finding: Finding,
    direction: str,
    dtype: str,
    judge: Callable[[Backend, CallFilter], list[Finding]],
    words: list[str],
) -> Rerun:
    """Returns the narrowest command that was seen to fail. In this order: a conformance case of the
    op in this dtype and direction, the captured call, all captured calls of the op, the whole
    bisection. `judge` replays captured calls; `words` are the command's."""
    mode = "grad" if direction == "backward" else "test"
    working = {getattr(torch, dtype)} & set(backend.dtypes)
    for case in select(backend, modes=(mode,), op=finding.op, dtypes=working, real=False):
        result = run_case(case, backend)
        if result.outcome == "fail":
            return Rerun(result.rerun)
    places = [CallFilter(finding.op, direction)]
    if finding.call >= 0:
        places.insert(0, CallFilter(finding.op, direction, finding.layer, finding.step))
    for place in places:
        if any(f.ratio > 1 for f in judge(backend, place)):
            return Rerun(join(words, place))
    note = "the op alone is right when it is repeated: the fault happened once, or it needs the "
    return Rerun(join(words, ANY_CALL), note + "calls before it")
