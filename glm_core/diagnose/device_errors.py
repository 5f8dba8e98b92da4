"""Turns what torch raises when a device fails (out of memory, lost, hung, a missing dtype) into one
message with a way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from glm_core import dispatch
from glm_core.errors import DeviceError, GlmCoreError
from glm_core.versions import AcceleratorError, is_accelerator_error

RUNTIME = (AcceleratorError, torch.OutOfMemoryError, NotImplementedError)
"""the exceptions of torch whose cause is the device"""

TRAINING_MEMORY = "use a smaller train.micro_batch or a smaller model"
GENERATION_MEMORY = (
    "use a shorter --context, --offload cpu, or weights in fewer bits (glm-core checkpoint convert "
    "--bits 4)"
)
"""what to do where memory ran out"""
_WAY_OUT = (
    (NotImplementedError, "use another train.dtype, or give the backend a kernel"),
    (
        AcceleratorError,
        "reset the device, then resume; glm-core align bisect waits for every "
        "call and names the op",
    ),
)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """Returns what torch.compile raises; nothing where nobody has loaded it."""
    loaded = sys.modules.get("torch._dynamo.exc")
    return (loaded.TorchDynamoException,) if loaded else ()


@contextmanager
def explained(backend: str, subject: str, memory: str = TRAINING_MEMORY) -> Iterator[None]:
    """Turns errors of the device inside the block into a DeviceError that names `subject`, the
    backend, the op if the stack shows one, the device's own message and the way out, `memory` where
    that ran out. A GlmCoreError passes unchanged, even when torch.compile has wrapped it
    (`strict`)."""
    try:
        yield
    except GlmCoreError:
        raise
    except _compiler_errors() as error:
        if isinstance(error.__cause__ or error.__context__, GlmCoreError):
            raise (error.__cause__ or error.__context__) from None  # type: ignore[misc]  # a GlmCoreError, as just checked
        raise
    except RUNTIME as error:
        late = is_accelerator_error(error)
        if not late and not isinstance(error, torch.OutOfMemoryError | NotImplementedError):
            raise  # before torch 2.8 a RuntimeError of another kind
        op = op_of(error.__traceback__)
        where = f"{'noticed in ' * late}op {op}" if op else ""
        raise device_error(error, subject, backend, where, memory) from error


def device_error(
    error: Exception,
    subject: str,
    backend: str,
    where: str,
    memory: str = TRAINING_MEMORY,
    **place: Any,
) -> DeviceError:
    """Returns an error such as `step 3: backend sim, op geglu forward: OutOfMemoryError: ...; use a
    smaller ...`."""
    words = " ".join(str(error).split("\n")[0].split())[:300]
    subject = ", ".join(filter(None, (f"{subject}: backend {backend}", where)))
    ways_out = ((torch.OutOfMemoryError, memory), *_WAY_OUT)
    way_out = next((text for kind, text in ways_out if isinstance(error, kind)), "")
    text = f"{subject}: {type(error).__name__}: {words}"
    return DeviceError(f"{text}; {way_out}" if way_out else text, **place)


def op_of(trace: TracebackType | None) -> str:
    """Returns the name of the op that was being dispatched, or "". On a device with a queue, an
    earlier op may be the one that failed."""
    name = ""
    while trace is not None:
        if trace.tb_frame.f_code is dispatch.run.__code__:
            name = trace.tb_frame.f_locals["op"].name
        trace = trace.tb_next
    return name
