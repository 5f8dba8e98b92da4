"""Defines every error the project raises on purpose. A message is one line: subject, fact, way
out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GlmCoreError(Exception):
    """Base of all deliberate errors. The CLI prints the message as one line, without a
    traceback."""


class ConfigError(GlmCoreError):
    """A configuration cannot be run; the message lists all bad keys at once."""


class BackendUnavailableError(GlmCoreError):
    """A backend exists but cannot run on this machine; the message has its own reason."""


class UnsupportedOpError(GlmCoreError, NotImplementedError):
    """Under `strict=True`, the backend has no kernel for an op or for its arguments."""


class NoRoomError(GlmCoreError):
    """What was asked for does not fit into the memory of its device."""


class ShapeError(GlmCoreError, ValueError):
    """Shapes or dtypes do not fit the op's contract."""


class DataError(GlmCoreError):
    """A corpus, a tokenizer or a sampler's state cannot be used."""


class TraceError(GlmCoreError):
    """A trace file is truncated or foreign, or cannot be compared with the other one."""


class RolloutError(GlmCoreError):
    """A file of log probabilities is truncated or foreign, or does not match the other one."""


class WitnessError(GlmCoreError):
    """A witness file is truncated, changed or foreign."""


class CheckpointError(GlmCoreError):
    """A checkpoint is truncated or foreign, or does not fit the model."""


class TrainingError(GlmCoreError):
    """Training had to stop; the message names step, parameter and op."""


class PromptError(GlmCoreError):
    """A prompt cannot be continued: it is empty, too long, without a blank, or has unknown
    tokens."""


class GenerationError(GlmCoreError):
    """Generation had to stop; the message names the token's number and the op."""


class DeviceError(TrainingError):
    """A backend's device or runtime failed; the message names backend, op and way out."""

    def __init__(self, message: str, **place: Any) -> None:
        """place: the call that failed, as far as known: op, direction, layer, step, call, dtype,
        shape."""
        super().__init__(message)
        self.place = place


def in_one_line(error: BaseException) -> str:
    """Returns the kind and the beginning of the message of whatever foreign code raised."""
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns a message such as `unknown backend 'cude'; known: cpu, cuda (did you mean cuda?)`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known) or 'none'}{hint}"
