"""Builds the Triton kernels of experts ahead of time as they would be launched for GLM-4.7-Flash:
`python expert_build.py cuda-90,hip-gfx90a bfloat16 [KERNEL,...]` prints the registers and the bytes
shared and spilled per target, dtype and kernel, and the faults that machine_code finds. Without
arguments: all targets that this Triton knows, and all dtypes."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from attention_build import HALVES, cuda_usage, family, hip_usage, with_faults
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_build import TARGETS

from glm_core.backends.cuda import expert_rows, grouped_codes, grouped_product, quantized

INTEGERS = ("rows", "experts", "outputs", "width", "group", "groups", "top_k", "top_groups")
STRIDES = ("w_x", "w_f", "w_w")
POINTERS = {
    **dict.fromkeys(("counts", "order", "back", "chosen"), "*i64"),
    **dict.fromkeys(("logits", "bias", "weights", "scores", "dweights", "dlogits"), "*fp32"),
    **{"codes": "*i8", "scale": "*fp16"},
}
XP, BLOCK = 64, 1024
CHOICE = {"NORMALIZE": True, "XP": XP, "TP": 4}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "few": (grouped_product.multiply_rows, {"w_w": 1}),
    "many": (grouped_product.multiply_rows, {"w_w": 1}),
    "few back": (grouped_product.multiply_rows, {"w_f": 1}),
    "many back": (grouped_product.multiply_rows, {"w_f": 1}),
    "weight": (grouped_product.multiply_columns, {}),
    "codes4 few": (grouped_codes.multiply_codes, {"BITS": 4}),
    "codes4 many": (grouped_codes.multiply_codes, {"BITS": 4}),
    "codes8 few": (grouped_codes.multiply_codes, {"BITS": 8}),
    "codes8 many": (grouped_codes.multiply_codes, {"BITS": 8}),
    "codes4 many back": (grouped_codes.multiply_codes_back, {"BITS": 4}),
    "codes8 few back": (grouped_codes.multiply_codes_back, {"BITS": 8}),
    "take_rows": (expert_rows.take_rows, {"BLOCK": BLOCK}),
    "add_rows": (expert_rows.add_rows, {"WEIGHTED": True, "BLOCK": BLOCK}),
    "spread_rows": (expert_rows.spread_rows, {"BLOCK": BLOCK}),
    "choose_experts": (expert_rows.choose_experts, {**CHOICE, "GROUPED": True, "GP": 8}),
    "choice_gradient": (expert_rows.choice_gradient, CHOICE),
}
"""name -> kernel, and what is fixed besides the cut"""


def cut_of(name: str, kind: str, target: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the constants and the compiler's options of a kernel that is cut."""
    codes = name.startswith("codes")
    table = grouped_codes.CUTS if codes else grouped_product.CUTS
    size = next(s for s in ("few", "many", "weight") if s in name)
    cut = table[kind][size]
    constants: dict[str, Any] = {"BM": cut.rows, "BN": cut.outputs, "BK": cut.inputs, "XP": XP}
    if codes:
        step = min(grouped_codes.STEPS[0], cut.inputs)
        since = tuple(map(int, triton.__version__.split(".")[:2])) >= quantized.TRITON_SINCE
        constants["PAIRS"] = kind == "mma" and since
        constants |= {"BN": step, "BK": cut.outputs} if "back" in name else {"BK": step}
    if size != "weight" and not (codes and "back" in name):
        constants["EVEN"] = True
    return constants, {"num_warps": cut.warps, "num_stages": cut.stages}


def signature(kernel: Any, constants: dict[str, Any], pointer: str) -> tuple[Any, Any]:
    """Returns the arguments' types, and which are multiples of 16, as in an ordinary call."""
    types, sixteen = {}, {}
    names = kernel.arg_names
    for at, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
        elif name in (*INTEGERS, *STRIDES) and not (name == "rows" and "top_k" in names):
            types[name] = "i32"
            if name in (*STRIDES, "outputs", "width", "group"):
                sixteen[at,] = [["tt.divisibility", 16]]
        elif name == "tiny" or (name == "scale" and "scores" in names):
            types[name] = "fp32"
        else:
            types[name] = POINTERS.get(name, pointer)
            if kernel is grouped_product.multiply_columns and name == "dweight":
                types[name] = pointer
            sixteen[at,] = [["tt.divisibility", 16]]
    return types, sixteen


def build(name: str, target: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Compiles one kernel and returns it with what it uses."""
    kernel, constants = KERNELS[name]
    options: dict[str, int] = {}
    if kernel.__module__ != expert_rows.__name__:
        more, options = cut_of(name, family(target, dtype), target)
        constants = constants | more
    types, sixteen = signature(kernel, constants, HALVES[dtype])
    kind, chip = target.split("-")
    made = triton.compile(
        ASTSource(kernel, types, constants, sixteen),
        target=GPUTarget(kind, int(chip) if kind == "cuda" else chip, 32 if kind == "cuda" else 64),
        options=options,
    )
    used = cuda_usage(made) if kind == "cuda" else hip_usage(made)
    return made, {**used, "shared_bytes": made.metadata.shared}


def main(targets: str = "", dtypes: str = "float32,bfloat16,float16", kernels: str = "") -> None:
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    known = [f"{kind}-{chip}" for (kind, chip, _), since in TARGETS.items() if release >= since]
    found: dict[str, Any] = {}
    for target in targets.split(",") if targets else known:
        for dtype in dtypes.split(","):
            if (target, dtype) == ("hip-gfx906", "bfloat16"):
                continue  # the chip has none
            names = kernels.split(",") if kernels else list(KERNELS)
            found |= with_faults(target, dtype, {n: build(n, target, dtype) for n in names})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
