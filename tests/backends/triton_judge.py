"""Runs conformance of the Triton kernels in Triton's interpreter, on the CPU: `python
triton_judge.py float32,bfloat16 MOST` prints {case: "" or what is wrong}, with at most MOST cases
per op and mode in each dtype; the first sample, with its NaN and infinity, in the first dtype
alone. `python triton_judge.py float32 attention [SAMPLE or CASE ...]` does so for attention,
`python triton_judge.py float16 products [CASE ...]` for products with codes and these cases of the
parts of a layer of experts, `python triton_judge.py - experts [CASE ...]` for those alone. A
process of its own: whether kernels are interpreted is settled when Triton is imported."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from glm_core import ops
from glm_core.backends import triton_ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import attention_launch, quantized_product
from glm_core.backends.cuda.attention import attention
from glm_core.backends.cuda.decode_ops import Step, inputs, packed
from glm_core.backends.cuda.experts import MODULES
from glm_core.backends.cuda.keep_kernel import keep
from glm_core.backends.cuda.kernels import share
from glm_core.conformance.case import Case, CaseFailure, dtype_name, select
from glm_core.conformance.check import judge
from glm_core.conformance.tolerance import allowance, deviation
from glm_core.decode_step import Rows, Stack
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.stack import angles, stack
from glm_core.spec import SUPPORTED, Support, unsupported

_converted = interpreter._convert_float


def to_nearest(x: Any, before: Any, after: Any, mode: Any) -> Any:
    """Makes Triton's interpreter round bfloat16 to nearest, as its compilers do. The interpreter
    (3.9) truncates, and its own rounding to nearest loses the carry into the exponent: 1.999
    becomes 1."""
    if (before, after) != (tl.float32, tl.bfloat16):
        return _converted(x, before, after, mode)
    wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = to_nearest


def widened(x: Any) -> Any:
    """Returns a tile in float32."""
    if x.dtype == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def dot(self: Any, a: Any, b: Any, c: Any, *how: Any) -> Any:
    """Multiplies two tiles. The interpreter (3.9) takes the bits of bfloat16 for integers. A chip
    sums in one order, whichever tile is transposed; numpy's library on some CPUs does not, so that
    logits of 40,000 come out otherwise backward than forward. So sums are rounded to float32 once.
    """
    product = np.matmul(widened(a), widened(b), dtype=np.float64)
    return interpreter.TensorHandle((product + c.data).astype(np.float32), c.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = dot
ATTENTION = {
    "attention": attention_launch.forward,
    "attention_backward": attention_launch.backward,
}


OPERATORS = {
    **triton_ops.OPERATORS,
    **{
        f"{op}_{way}": getattr(import_module(f"glm_core.backends.cuda.{module}"), f"{op}_{way}")
        for op, module in MODULES.items()
        for way in ("forward", "backward")
    },
}


class InTriton(TorchDispatchMode):
    """Sends the operators of glm_core to the Triton kernels."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "glm_core" and func._opname not in OPERATORS:
            with self:  # made of others, which it calls; seen in inference mode
                return func.decompose(*args, **(kwargs or {}))
        if func.namespace == "glm_core":
            func = OPERATORS[func._opname]
        elif func.namespace == "glm_core_gpu":
            func = ATTENTION[func._opname]
        return func(*args, **(kwargs or {}))


def complaint(case: Case, backend: Backend) -> str:
    """Returns what is wrong, '' where the case passes."""
    try:
        return judge(case, backend).reason
    except CaseFailure as finding:
        return str(finding)
    except Exception as error:  # the interpreter's own errors among them
        return f"{type(error).__name__}: {error}"


def judged(dtypes: str, most: int) -> dict[str, str]:
    """Judges at most so many cases per op, mode and dtype, without the shapes of published
    models."""
    backend = Backend(name="triton", device_type="cpu", verified="executed on the CPU")
    share(backend)
    found: dict[str, str] = {}
    wanted = dtypes.split(",")
    taken: Counter[Any] = Counter()
    for case in select(backend, real=False):
        if case.op.name not in triton_ops.OPS or dtype_name(case.dtype) not in wanted:
            continue
        taken[case.op.name, case.mode, case.dtype] += 1
        if case.plain and dtype_name(case.dtype) != wanted[0]:
            continue
        if taken[case.op.name, case.mode, case.dtype] <= most and not case.raises:
            found[case.id] = complaint(case, backend)
    return found


def judged_attention(dtypes: str, samples: tuple[str, ...]) -> dict[str, str]:
    """Judges attention on these samples, or on all of them, and compares ways to split the keys."""
    backend = Backend(name="triton", device_type="cpu", verified="executed on the CPU")
    backend.implements(ops.attention)(attention)
    cases = [
        c
        for c in select(backend, op="attention")
        if dtype_name(c.dtype) in dtypes.split(",")
        and (not samples or not {c.sample.id, c.id}.isdisjoint(samples))
    ]
    return (
        {c.id: complaint(c, backend) for c in cases}
        | split_errors()
        | keep_errors()
        | latent_errors()
    )


def judged_experts(ids: tuple[str, ...]) -> dict[str, str]:
    """Judges these cases of the parts of a layer of experts, or all small ones."""
    backend = Backend(name="triton", device_type="cpu", verified="executed on the CPU")
    for name in MODULES:
        backend.implements(ops.all_ops()[name])(cpu.kernels[name].function)
    every = [c for name in MODULES for c in select(backend, op=name, real=False)]
    return {c.id: complaint(c, backend) for c in every if not ids or c.id in ids}


def judged_products(dtypes: str) -> dict[str, str]:
    """Judges products with codes, whatever their number of rows, and one of several blocks."""
    backend = Backend(name="triton", device_type="cpu", verified="executed on the CPU")

    def supports(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        bits: int = 8,
        activation_bits: int = 16,
    ) -> Support:
        group = x.shape[-1] // (1 if scale.ndim == 1 else scale.shape[1])
        takes = activation_bits == 16 and group % 32 == 0 and len(x) > 0
        return SUPPORTED if takes else unsupported("not for this kernel")

    def product(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        bits: int = 8,
        activation_bits: int = 16,
    ) -> Tensor:
        return quantized_product.product(x, weight, scale, bias, bits)

    backend.implements(ops.quantized_linear, supports)(product)
    found, wanted = {}, dtypes.split(",")
    for case in select(backend, op="quantized_linear", real=False):
        if dtype_name(case.dtype) in wanted and case.mode == "test" and not case.raises:
            found[case.id] = complaint(case, backend)
    return {k: v for k, v in found.items() if "not for this kernel" not in v} | block_errors()


def block_errors() -> dict[str, str]:
    """Compares products of more rows and outputs than a block has with float64, by the rule of
    conformance."""
    g, errors = torch.Generator().manual_seed(0), {}
    for bits, group, dtype in ((4, 96, torch.bfloat16), (8, 64, torch.float16)):
        x = torch.randn(2, 131, 192, generator=g).to(dtype)
        codes = torch.randint(-128, 128, (70, 192 * bits // 8), generator=g).to(torch.int8)
        scale = torch.rand(70, 192 // group, generator=g) / 2**bits
        bias = torch.randn(70, generator=g).to(dtype)
        y = quantized_product.product(x, codes, scale, bias, bits)
        reference = ops.quantized_linear.reference
        exact = reference(x.double(), codes, scale.double(), bias.double(), bits)
        found = deviation(y, allowance(exact, [reference(x, codes, scale, bias, bits)]))
        errors[f"blocks-int{bits}"] = "" if found.ratio <= 2 else f"{found.ratio} {found.where}"
    return errors


def keep_errors() -> dict[str, str]:
    """Compares rotated queries, and the cache, with those that the ops give: for models without
    rotation, with both kinds of pairs, and with two rows of positions."""
    errors, g = {}, torch.Generator().manual_seed(0)
    for name, dtype in (
        ("glm-base", torch.float32),
        ("chatglm-6b", torch.float16),
        ("glm-4-9b", torch.bfloat16),
        ("glm-4-0414-9b", torch.float32),
    ):
        sizes = {"hidden": 96, "num_heads": 4, "num_kv_heads": 4, "head_dim": 24, "ffn": 32}
        model = GLM(preset(name, num_layers=1, vocab=8, max_length=40, **sizes)).init_weights(0)
        parts = stack(model.to(dtype), lambda m=model: angles(m, 40))
        assert isinstance(parts, Stack)
        rows = Rows([1, 2], [31, 7, 4, 9], [0, 0], [6, 9], [5, 8])
        step, fed = Step(parts), inputs(packed(rows))
        qkv = torch.randn(2, 1, 12, 24, generator=g).to(dtype)
        kept = torch.randn(2, 3, 4, 40, 24, generator=g).to(dtype)  # [2, slots, K, S, E]
        expected = kept.clone()
        q = keep(qkv, step._angles, fed.positions, fed.places, kept, 4, parts.rope_interleaved)
        with torch.no_grad():
            right = step._kept(qkv, fed, expected)
        off = max(float((a - b).abs().max()) for a, b in ((q, right), (kept, expected)))
        limit = 8 * torch.finfo(dtype).eps
        errors[f"keep-{name}"] = "" if off <= limit else f"off by {off:.2e}"
    return errors


def split_errors() -> dict[str, str]:
    """Compares one query per sequence over a long cache, its keys split over more and more
    processors, with the reference in float64."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 4, 24, generator=g)  # [B, L, H, E]
    k, v = torch.randn(2, 2, 500, 2, 24, generator=g)[:, :, :450]  # [B, S, K, E]
    intervals = torch.tensor([[3], [0]]).int(), torch.tensor([[411], [40]]).int()
    exact = ops.attention.reference(q.double(), k.double(), v.double(), *intervals, 0.2)
    found = {}
    for processors in (2, 6, 8):  # 1, 3 and 4 splits
        attention_launch._processors = lambda device, n=processors: n
        error = float((attention(q, k, v, *intervals, 0.2) - exact).abs().max())
        found[f"processors-{processors}"] = "" if error < 1e-6 else f"off by {error:.2e}"
    return found


def latent_errors() -> dict[str, str]:
    """Compares absorbed latent attention, a query of 20 heads over latents of 512 + 64, with
    float64, by the rule of conformance."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 20, 576, generator=g).bfloat16()
    k = torch.randn(1, 37, 1, 576, generator=g).bfloat16()
    rest = (torch.tensor([[3]]).int(), torch.tensor([[36]]).int(), 256**-0.5)
    y = attention_launch.forward(q, k, k[..., :512], *rest)[0]
    reference = ops.attention.reference
    exact = reference(q.double(), k.double(), k[..., :512].double(), *rest)
    found = deviation(y, allowance(exact, [reference(q, k, k[..., :512], *rest)]))
    return {"latent": "" if found.ratio <= 2 else f"{found.ratio} {found.where}"}


def main(dtypes: str, what: str, *names: str) -> None:
    with InTriton():  # type: ignore[no-untyped-call]  # torch's own
        if what == "attention":
            found = judged_attention(dtypes, names)
        elif what == "products":
            found = judged_products(dtypes) | (judged_experts(names) if names else {})
        elif what == "experts":
            found = judged_experts(names)
        else:
            found = judged(dtypes, int(what))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
