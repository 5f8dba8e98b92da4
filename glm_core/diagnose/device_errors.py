"""What a device that gives up looks like from above: out of memory, lost, hung, no such dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from glm_core import dispatch
from glm_core.errors import DeviceError, GlmCoreError

RUNTIME = (torch.AcceleratorError, torch.OutOfMemoryError, NotImplementedError)
"""what torch raises where the device is the reason"""

_WAY_OUT = (
    (torch.OutOfMemoryError, "use a smaller train.micro_batch or a smaller model"),
    (NotImplementedError, "use another train.dtype, or give the backend a kernel"),
    (
        torch.AcceleratorError,
        "reset the device, then resume; glm-core align bisect waits for every "
        "call and names the op",
    ),
)


@contextmanager
def explained(backend: str, what: str) -> Iterator[None]:
    """Turns what the device raises in the block into a DeviceError: `what`, backend, op as far as
    the stack tells, the device's own words, the way out. A GlmCoreError stays one, also where
    torch.compile wraps it (`strict`)."""
    try:
        yield
    except GlmCoreError:
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        if isinstance(error.__cause__ or error.__context__, GlmCoreError):
            raise (error.__cause__ or error.__context__) from None  # type: ignore[misc]  # it is one
        raise
    except RUNTIME as error:
        op = op_of(error.__traceback__)
        late = "noticed in " if isinstance(error, torch.AcceleratorError) else ""
        raise device_error(error, what, backend, f"{late}op {op}" if op else "") from error


def device_error(
    error: Exception, what: str, backend: str, where: str, **place: Any
) -> DeviceError:
    """`step 3: backend sim, op geglu forward: OutOfMemoryError: ...; use a smaller ...`."""
    words = " ".join(str(error).split("\n")[0].split())[:300]
    subject = ", ".join(filter(None, (f"{what}: backend {backend}", where)))
    way_out = next((text for kind, text in _WAY_OUT if isinstance(error, kind)), "")
    text = f"{subject}: {type(error).__name__}: {words}"
    return DeviceError(f"{text}; {way_out}" if way_out else text, **place)


def op_of(trace: TracebackType | None) -> str:
    """The op that was being dispatched, "" where none was; with a queue not the one that failed."""
    found = ""
    while trace is not None:
        if trace.tb_frame.f_code is dispatch.run.__code__:
            found = trace.tb_frame.f_locals["op"].name
        trace = trace.tb_next
    return found
