"""Every error the project raises on purpose: one line that says subject, fact and way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GlmCoreError(Exception):
    """Base of all deliberate errors; the CLI prints its message as one line, never a traceback."""


class ConfigError(GlmCoreError):
    """A configuration that cannot be run; the message lists every bad key at once."""


class BackendUnavailableError(GlmCoreError):
    """The backend exists but cannot run on this machine; carries the backend's own reason."""


class UnsupportedOpError(GlmCoreError, NotImplementedError):
    """Under `strict=True`: the backend has no kernel for this op or these arguments."""


class ShapeError(GlmCoreError, ValueError):
    """Shapes or dtypes that do not fit the op's contract."""


class DataError(GlmCoreError):
    """A corpus, tokenizer or sampler state that cannot be used."""


class TraceError(GlmCoreError):
    """A trace file that is truncated, foreign, or cannot be compared with the other one."""


class CheckpointError(GlmCoreError):
    """A checkpoint that is truncated, foreign, or does not fit the model."""


class TrainingError(GlmCoreError):
    """Training had to stop: the message names step, parameter and op."""


class PromptError(GlmCoreError):
    """A prompt that cannot be continued: empty, too long, without a blank, of unknown tokens."""


class GenerationError(GlmCoreError):
    """Generation had to stop: the message names the token's number and the op."""


class DeviceError(TrainingError):
    """A backend's device or runtime gave up: the message names backend, op and way out. `place`
    says in which call, as far as that is known: op, direction, layer, step, call, dtype, shape."""

    def __init__(self, message: str, **place: Any) -> None:
        super().__init__(message)
        self.place = place


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown backend 'cude'; known: cpu, cuda (did you mean cuda?)`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known) or 'none'}{hint}"
