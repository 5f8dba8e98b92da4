"""Writes captured calls as plain values and tensors, and reads them back. A tensor that several
calls share is written once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from glm_core.errors import TraceError
from glm_core.verdict import oracle, references
from glm_core.verdict.oracle import Call, Results
from glm_core.verdict.places import Place

MAX_ELEMENTS = 1 << 28
"""a call whose tensors have more elements in all is refused"""
WORD = re.compile(r"[\w ,:.-]{0,64}")
"""what a string among the arguments may be: a mode such as `lower`, never a path"""
KINDS = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


@dataclasses.dataclass(slots=True, eq=False)
class Recorded:
    """A call with what it computed on the machine of the record."""

    call: Call
    results: Results
    place: Place
    step: int


class Tensors:
    """The tensors of a record, by the hash of their content."""

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = values or {}

    def put(self, x: Tensor) -> dict[str, Any]:
        """Keeps a tensor; returns what `get` needs. Elements that a view repeats are kept once, and
        the order of the dimensions in memory is kept."""
        x = x.detach().cpu().resolve_conj().resolve_neg()
        is_complex, shape = x.is_complex(), list(x.shape)
        x = torch.view_as_real(x) if is_complex else x
        for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if stride == 0 and size > 1:
                x = x.narrow(dim, 0, 1)
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda d: -strides[d])
        x = x.permute(order)
        body = torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x)  # contiguous, no view
        content: Any = body.view(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        key = f"{digest}.{body.dtype}.{'x'.join(map(str, body.shape))}"
        self.values.setdefault(key, body)
        return {"tensor": key, "shape": shape, "order": order, "complex": is_complex}

    def get(self, value: dict[str, Any]) -> Tensor:
        """Returns the tensor that `put` kept. Raises what malformed values raise."""
        body, order = self.values[value["tensor"]], value["order"]
        x = body.permute([order.index(d) for d in range(body.ndim)])
        if value["complex"]:
            x = torch.view_as_complex(x.contiguous())
        if math.prod(value["shape"]) > MAX_ELEMENTS:
            raise ValueError(f"a tensor of shape {value['shape']}")
        return x.expand(value["shape"])


def encode(value: Any, tensors: Tensors) -> Any:
    """Returns an argument as JSON can hold it. Raises TypeError for what it cannot."""
    if isinstance(value, Tensor):
        return tensors.put(value)
    if isinstance(value, list):
        return [encode(x, tensors) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(x, tensors) for x in value]}
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"an argument of type {type(value).__name__}")


def decode(value: Any, tensors: Tensors) -> Any:
    """Returns the argument that `encode` wrote. Raises what malformed values raise."""
    if isinstance(value, list):
        return [decode(x, tensors) for x in value]
    if isinstance(value, str) and not WORD.fullmatch(value):
        raise ValueError(f"the argument {value!r:.40}")
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.get(value)
    [(name, inner)] = value.items()
    if name == "tuple":
        return tuple(decode(x, tensors) for x in inner)
    if name == "device":
        return torch.device(inner)
    plain = getattr(torch, inner)
    if not isinstance(plain, KINDS[name]):
        raise ValueError(f"{inner!r:.40} is no {name}")
    return plain


def row(recorded: Recorded, tensors: Tensors) -> dict[str, Any]:
    """Returns a call as JSON can hold it. Raises TypeError for arguments that it cannot."""
    call = recorded.call
    return {
        "operator": call.func._schema.name,
        "overload": call.func._schema.overload_name or "default",
        "device": call.device_type,
        "args": encode(list(call.args), tensors),
        "kwargs": {n: encode(x, tensors) for n, x in call.kwargs.items()},
        "results": {n: tensors.put(y) for n, y in recorded.results.items()},
        "place": dataclasses.asdict(recorded.place),
        "step": recorded.step,
    }


def operator(name: str, overload: str) -> Any:
    """Returns an operator that computes values of tensors; None where this torch does not have it.
    Raises TraceError for any other operator, because a record may come from anywhere."""
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), short, None)
    func = getattr(packet, overload, None)
    if func is None:
        return None
    if references.why_not(func) or not oracle.computes(func):
        raise TraceError(f"{name} is not an operator that records hold; record again")
    return func


def recorded(value: dict[str, Any], tensors: Tensors) -> Recorded | None:
    """Returns the call that `row` wrote, None where this torch lacks the operator. Raises
    TraceError."""
    try:
        func = operator(value["operator"], value["overload"])
        args = tuple(decode(value["args"], tensors))
        kwargs = {n: decode(x, tensors) for n, x in value["kwargs"].items()}
        results = {n: tensors.get(y) for n, y in value["results"].items()}
        call = Call(func, args, kwargs, str(value["device"]))
        place = Place(**{k: str(v) for k, v in value["place"].items()})
        used = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not used or not results or sum(t.numel() for t in used) > MAX_ELEMENTS:
            raise ValueError("a call without tensors, or with too large ones")
        return Recorded(call, results, place, int(value["step"])) if func is not None else None
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise TraceError(f"malformed call ({error!r:.120}); record again") from None
