"""Plants defects on request, to show how a broken accelerator looks to its testers.

The environment variable VENDOR_SIM_FAULT plants them too:
"bit_flip:op=sim::adamw,call=3;hang:op=aten::mm,call=9"."""

from __future__ import annotations

import os

import torch

KINDS = {
    "wrong_op": "every floating result of the op is multiplied by `value` (1.001)",
    "tanh_gelu": "sim::geglu uses the tanh approximation in its forward",
    "bit_flip": "bit `value` (30, modulo the width) of the op's first resulting element is flipped",
    "stale_buffer": "the op returns the result of its previous call with the same shapes",
    "missing_dtype": "the device has no `dtype`: an op that writes it raises NotImplementedError",
    "out_of_memory": "the device has only `value` bytes of memory",
    "device_lost": "the device is lost while it runs the op; every later call fails",
    "hang": "the op does not finish until `clear_faults`; waits end in an error after the timeout",
    "cpu_fallback": "the runtime silently sends the op to the host; see torch.sim.fallbacks()",
}
_VALUES = {"wrong_op": 1.001, "bit_flip": 30.0}


def fault(
    kind: str, *, op: str = "", call: int = 0, value: float | None = None, dtype: str = ""
) -> None:
    """Plants a defect in `op` (`aten::mul`, `sim::geglu`, ...; empty: all ops) at its call number
    `call`, counted from 1 from now on (0: every call). Raises ValueError for an unknown kind or
    dtype."""
    if kind not in KINDS:
        raise ValueError(f"unknown fault {kind!r}; known: {', '.join(sorted(KINDS))}")
    if kind == "missing_dtype" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"fault missing_dtype: unknown dtype {dtype!r}; e.g. bfloat16")
    value = _VALUES.get(kind, 0.0) if value is None else value
    if kind == "out_of_memory":
        torch.ops.sim.set_memory_limit(int(value))
    else:
        torch.ops.sim.fault(kind, op, call, value, dtype)


def clear_faults() -> None:
    """Removes all defects. A hung op goes on; a lost device drops its queue and works again."""
    torch.ops.sim.clear_faults()
    torch.ops.sim.set_memory_limit(2**62)


def missing(dtype: torch.dtype) -> bool:
    """Returns whether a fault has taken this dtype from the device."""
    return torch.ops.sim.lacks(dtype)


def read_environment() -> None:
    """Plants the defects in VENDOR_SIM_FAULT; VENDOR_SIM_TIMEOUT_S sets the timeout of waits."""
    for text in filter(None, os.environ.get("VENDOR_SIM_FAULT", "").split(";")):
        kind, _, rest = text.partition(":")
        options = dict(item.split("=", 1) for item in rest.split(",") if item)
        convert = {"call": int, "value": float}
        fault(kind, **{key: convert.get(key, str)(text) for key, text in options.items()})
    if seconds := os.environ.get("VENDOR_SIM_TIMEOUT_S"):
        torch.ops.sim.set_timeout(float(seconds))
