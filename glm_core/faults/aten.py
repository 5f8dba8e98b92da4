"""Makes mistakes in ATen operators: wrong versions of them, and a mode that runs one in place of
the right one in any program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm_core.faults.rounding import rough_exp, ten_bits, truncated

aten = torch.ops.aten
Wrong = Callable[..., Any]
"""takes what the operator takes, the operator itself first"""


@dataclasses.dataclass(frozen=True, slots=True)
class AtenFault:
    """A mistake in one operator."""

    operator: str
    """`aten::mm`"""
    name: str
    wrong: Wrong
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """working dtypes in which it is a fault"""


ATEN_FAULTS: list[AtenFault] = []


def _fault(operator: str, name: str, wrong: Wrong, *dtypes: str) -> None:
    both = ("float32", "bfloat16")
    ATEN_FAULTS.append(AtenFault(f"aten::{operator}", name, wrong, dtypes or both))


class Planted(TorchDispatchMode):
    """A mode under which one operator is wrong."""

    def __init__(self, fault: AtenFault) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.fault = fault

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name == self.fault.operator:
            return self.fault.wrong(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def aten_fault(name: str) -> AtenFault:
    """Returns the fault of this name."""
    [fault] = [f for f in ATEN_FAULTS if f.name == name]
    return fault


# how a fault is made ------------------------------------------------------------------


def _result(edit: Callable[[Tensor], Tensor], which: int = 0) -> Wrong:
    """Edits one output."""

    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if not isinstance(out, tuple):
            return edit(out)
        return (*out[:which], edit(out[which]), *out[which + 1 :])

    return wrong


def _arguments(edit: Callable[[Tensor], Tensor], *which: int) -> Wrong:
    """Edits arguments."""

    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        edited = [edit(a) if i in which else a for i, a in enumerate(args)]
        return func(*edited, **kwargs)

    return wrong


def _option(name: str, edit: Callable[[Any], Any], default: Any) -> Wrong:
    """Edits an argument that is passed by name."""

    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **(kwargs | {name: edit(kwargs.get(name, default))}))

    return wrong


def _written(edit: Callable[..., Tensor]) -> Wrong:
    """Replaces what an operator leaves in its first argument by `edit(before, after)`."""

    def wrong(func: Any, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = first.clone()
        func(first, *args, **kwargs)
        return first.copy_(edit(before, first.clone()))

    return wrong


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.float() * factor).to(x.dtype)


def _without_last(dim: int) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x.select(dim, -1).zero_()
        return x

    return edit


def _swapped(x: Tensor) -> Tensor:
    """Exchanges the first two of the first dimension."""
    return torch.cat([x[1:2], x[:1], x[2:]])


def _rough(x: Tensor) -> Tensor:
    """Has a relative error of up to 1e-4 that depends on the value."""
    wave = torch.sin(64 * torch.log2(x.float().abs().clamp_min(1e-30)))
    return (x.float() * (1 + 1e-4 * wave)).to(x.dtype)


def _cut(x: Tensor) -> Tensor:
    """Cuts results to bfloat16 as a kernel does that stores the upper half word: the value is
    moved towards zero where rounding went away from it, about every second time."""
    half = torch.arange(x.numel(), device=x.device).reshape(x.shape) % 2 == 0
    step = (x.view(torch.int16) - 1).view(x.dtype)
    return torch.where(half & (x != 0), step, x)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


# matrix products ----------------------------------------------------------------------

for _op, _at in (("mm", (0, 1)), ("addmm", (1, 2)), ("bmm", (0, 1))):
    _fault(_op, f"{_op}: arguments cut to TF32", _arguments(ten_bits, *_at), "float32")
    _fault(
        _op, f"{_op}: the last term of each sum is left out", _arguments(_without_last(-1), _at[0])
    )
    _fault(_op, f"{_op}: the last row is zero", _result(_without_last(-2)))
    _fault(_op, f"{_op}: results cut off, not rounded", _result(_cut), "bfloat16")
_fault("addmm", "addmm: the bias is left out", lambda f, c, a, b, **k: f(torch.zeros_like(c), a, b))
_fault("bmm", "bmm: two batches exchanged", _result(_swapped))

# softmax, norms, activations ----------------------------------------------------------

for _op in ("_softmax", "_safe_softmax", "_log_softmax"):
    _fault(_op, f"{_op}: a temperature of 1.001", _arguments(_times(1.001), 0), "float32")
    _fault(_op, f"{_op}: the last class is left out of the sum", _result(lambda y: _grown(y)))
for _op in ("_softmax_backward_data", "_log_softmax_backward_data"):
    _fault(_op, f"{_op}: the last class has no gradient", _result(_without_last(-1)))
    _fault(_op, f"{_op}: gradients 0.1 % too large", _result(_times(1.001)), "float32")


def _grown(y: Tensor) -> Tensor:
    """Returns probabilities, or logarithms of them, as if the last one were not in the sum."""
    if float(y.max()) > 0:
        return (y.double() / (1 - y[..., -1:].double()).clamp_min(1e-6)).to(y.dtype)
    return (y.double() - torch.log1p(-y[..., -1:].double().exp().clamp_max(0.999))).to(y.dtype)


def _layer_norm(eps_outside: bool, less: int) -> Wrong:
    def wrong(
        func: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float
    ) -> tuple[Tensor, ...]:
        _, mean, rstd = func(x, shape, weight, bias, eps)
        wide = x.float()
        var = wide.var(-1, correction=less, keepdim=True)
        own = 1 / (var.sqrt() + eps) if eps_outside else (var + eps).rsqrt()
        out = (wide - wide.mean(-1, keepdim=True)) * own
        out = out if weight is None else out * weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype), mean, rstd

    return wrong


_fault(
    "native_layer_norm", "native_layer_norm: eps outside the root", _layer_norm(True, 0), "float32"
)
_fault(
    "native_layer_norm", "native_layer_norm: the variance divides by n - 1", _layer_norm(False, 1)
)
_fault("native_layer_norm", "native_layer_norm: results cut off", _result(_cut), "bfloat16")
_NORM_BACK = "native_layer_norm_backward"
_fault(
    _NORM_BACK,
    "native_layer_norm_backward: the mean's part is left out",
    _result(lambda g: _off(g)),
)
_fault(
    _NORM_BACK,
    "native_layer_norm_backward: weight gradients summed in bfloat16",
    _result(_bf16, 1),
    "float32",
)
_fault(
    _NORM_BACK,
    "native_layer_norm_backward: the last bias has no gradient",
    _result(_without_last(-1), 2),
)


def _off(g: Tensor) -> Tensor:
    """Adds 2 % of its root mean square to a gradient."""
    return (g.float() + 0.02 * g.float().square().mean().sqrt()).to(g.dtype)


def _other_gelu(func: Any, x: Tensor, *, approximate: str = "none") -> Any:
    return func(x, approximate="none" if approximate == "tanh" else "tanh")


def _other_gelu_backward(func: Any, g: Tensor, x: Tensor, *, approximate: str = "none") -> Any:
    return func(g, x, approximate="none" if approximate == "tanh" else "tanh")


def _silu(x: Tensor, slope: float) -> Tensor:
    wide = x.float()  # in 16 bits the slope would be lost in the rounding of its product with x
    return (wide * torch.sigmoid(slope * wide)).to(x.dtype)


_fault("gelu", "gelu: the other formula, tanh for erf", _other_gelu, "float32")
_fault("gelu_backward", "gelu_backward: the other formula's", _other_gelu_backward, "float32")
_fault("silu", "silu: x sigmoid(1.002 x)", lambda f, x: _silu(x, 1.002))
_fault(
    "silu_backward",
    "silu_backward: the second term is left out",
    lambda f, g, x: g * torch.sigmoid(x),
)
for _op in ("tanh", "exp", "rsqrt", "sqrt", "cos", "sin", "sigmoid", "softplus", "div"):
    _fault(_op, f"{_op}: relative error of up to 1e-4", _result(_rough), "float32")
for _op in ("gelu", "silu", "tanh", "mul", "add", "rsqrt", "mean"):
    _fault(_op, f"{_op}: results cut off, not rounded", _result(_cut), "bfloat16")
_fault("exp", "exp: a rough polynomial", lambda f, x: rough_exp(x), "float32")
_fault("pow", "pow: 0.1 % too large", _result(_times(1.001)), "float32")
_fault("mean", "mean: the last term is left out", _arguments(_without_last(-1), 0))
_fault("sum", "sum: the last term is left out", _arguments(_without_last(-1), 0))
_fault("sum", "sum: terms rounded to bfloat16", _arguments(_bf16, 0), "float32")
_fault("cat", "cat: the last element is lost", _result(_without_last(-1)))

# embedding, loss, conversion, convolution ---------------------------------------------

_fault(
    "embedding",
    "embedding: the first row is the second's",
    lambda f, w, i, *r: f(w, torch.where(i == i.min(), i.max(), i), *r),
)


def _last_wins(func: Any, g: Tensor, index: Tensor, rows: int, *rest: Any) -> Tensor:
    """Writes the gradient of each row where it should be added."""
    out = g.new_zeros(rows, g.shape[-1])
    out[index.flatten()] = g.reshape(-1, g.shape[-1])
    return out


_fault(
    "embedding_dense_backward",
    "embedding_dense_backward: rows that occur twice are not added",
    _last_wins,
)
_fault("nll_loss_forward", "nll_loss_forward: divides by n + 1", _result(lambda y: y * 0.99))
_fault("nll_loss_backward", "nll_loss_backward: 0.1 % too large", _result(_times(1.001)), "float32")
_fault(
    "_to_copy",
    "_to_copy: bfloat16 cut off, not rounded",
    lambda f, x, **k: (
        truncated(x) if k.get("dtype") == torch.bfloat16 and x.dtype == torch.float32 else f(x, **k)
    ),
    "bfloat16",
)
_fault(
    "convolution",
    "convolution: the last row of the input is zero",
    _arguments(_without_last(-1), 0),
)
_fault(
    "convolution_backward",
    "convolution_backward: weight gradients in bfloat16",
    _result(_bf16, 1),
    "float32",
)

# attention ----------------------------------------------------------------------------

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _flash_of(edit: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Wrong:
    return lambda f, q, k, v, *rest, **options: f(*edit(q, k, v), *rest, **options)


_fault(
    _FLASH,
    f"{_FLASH}: scaled by 0.3 % too much",
    _flash_of(lambda q, k, v: (_times(1.003)(q), k, v)),
    "float32",
)
_fault(
    _FLASH,
    f"{_FLASH}: the last key is not seen",
    _flash_of(lambda q, k, v: (q, k, _without_last(2)(v))),
)
_fault(_FLASH, f"{_FLASH}: heads exchanged", _result(lambda y: y.flip(1)))
_fault(
    f"{_FLASH}_backward",
    f"{_FLASH}_backward: key gradients 1 % too large",
    _result(_times(1.01), 1),
    "float32",
)
_fault(
    f"{_FLASH}_backward",
    f"{_FLASH}_backward: the last query has no gradient",
    _result(_without_last(2), 0),
)

# optimizers ---------------------------------------------------------------------------

_fault("lerp_", "lerp_: 0.1 % too far", _written(lambda a, b: a + (b - a) * 1.001), "float32")
_fault(
    "addcmul_",
    "addcmul_: the product 1 % too large",
    _written(lambda a, b: a + (b - a) * 1.01),
    "float32",
)
_fault(
    "addcdiv_",
    "addcdiv_: the step 1 % too long",
    _written(lambda a, b: a + (b - a) * 1.01),
    "float32",
)
_fault("mul_", "mul_: not applied", _written(lambda a, b: a))
_fault(
    "add_",
    "add_: the last element is not changed",
    _written(lambda a, b: torch.cat([b.flatten()[:-1], a.flatten()[-1:]]).view_as(a)),
)


def _adam(**change: Any) -> Wrong:
    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **(kwargs | {n: edit(kwargs[n]) for n, edit in change.items()}))

    return wrong


for _op in ("_fused_adamw_", "_fused_adam_"):
    _fault(_op, f"{_op}: no weight decay", _adam(weight_decay=lambda w: 0.0), "float32")
    _fault(_op, f"{_op}: eps a thousand times as large", _adam(eps=lambda e: 1000 * e), "float32")
    _fault(_op, f"{_op}: beta2 is 0.99", _adam(beta2=lambda b: 0.99))
_fault(
    "_foreach_lerp_",
    "_foreach_lerp_: not applied to the last tensor",
    lambda f, a, b, w: f(a[:-1], b[:-1], w),
)
_fault(
    "_foreach_addcdiv_",
    "_foreach_addcdiv_: not applied to the last tensor",
    lambda f, a, b, c, *w: f(
        a[:-1], b[:-1], c[:-1], *(x[:-1] if isinstance(x, list) else x for x in w)
    ),
)
