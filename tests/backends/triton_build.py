"""Builds the Triton kernels ahead of time for devices that are not here: `python triton_build.py
cuda-90 hip-gfx90a` prints {target: {kernel: [bytes of machine code, faults found in it]}}, without
arguments for all targets that this Triton knows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm_core.backends import triton_ops as ops
from glm_core.backends.cuda import keep_kernel, quantized, quantized_product

TARGETS = {  # the oldest triton that builds for it here; 3.4 and 3.7 were not tried
    ("cuda", 80, 32): (3, 3),
    ("cuda", 90, 32): (3, 3),
    ("hip", "gfx906", 64): (3, 8),  # 3.6 calls it an unsupported target
    ("hip", "gfx90a", 64): (3, 5),  # 3.3 links with the system's lld; Debian 12's is too old
    ("hip", "gfx942", 64): (3, 5),
}
POINTERS = {
    "stats": "*fp32",
    "loss": "*fp32",
    "token_weight": "*fp32",
    "labels": "*i64",
    "dweight": "*fp32",
    "dbias": "*fp32",
    "angles": "*fp32",
    "positions": "*i64",
    "places": "*i64",
    "codes": "*i8",
    "scale": "*fp16",
}
NUMBERS = {
    **dict.fromkeys(("known", "heads", "kv_heads", "m_side", "m_slot", "m_head", "m_place"), "i32"),
    **dict.fromkeys(("outputs", "groups"), "i32"),
    "rows": "i32",
    "width": "i32",
    "size": "i32",
    "vocab": "i32",
    "per_chunk": "i32",
    "eps": "fp32",
    "alpha": "fp32",
}
KERNELS: dict[Any, dict[str, Any]] = {
    ops.norm_rows: {"ADD": True, "LAYER": True, "BLOCK": 4096},
    ops.norm_rows_backward: {"MORE": True, "LAYER": True, "SCALED": True, "BLOCK": 4096},
    ops.norm_columns_backward: {"LAYER": True, "BLOCK": ops.COLUMNS},
    ops.activate: {"KIND": ops.GEGLU, "BACK": True, "BLOCK": 1024},
    keep_kernel.keep_rows: {"G": 1, "P": 32, "INTERLEAVED": True, "E": 128, "EP": 128},
    ops.row_losses: {"GRADIENT": True, "BLOCK": ops.LOGITS},
}


def built(kernel: Any, constants: dict[str, Any], target: tuple[Any, ...], half: str) -> Any:
    """Returns the compiled kernel, with tensors in `half`."""
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else NUMBERS.get(n) or POINTERS.get(n, half) for n in names
    }
    return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget(*target))


def built_product(target: tuple[Any, ...], half: str, bits: int, rows: int) -> Any:
    """Returns the compiled product with codes, for sizes that are multiples of 16."""
    kernel, kind = quantized_product.many_rows, target[0]
    cut = dict(quantized_product.cut_for(f"sm_{target[1]}" if kind == "cuda" else target[1], rows))
    options = {name: cut.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**cut, "BK": 64, "BIASED": True, "BITS": bits, "PAIRS": kind == "cuda"}
    given = [n for n in kernel.arg_names if n not in constants]
    signature = dict.fromkeys(constants, "constexpr")
    signature |= {n: NUMBERS.get(n) or POINTERS.get(n, half) for n in given}
    ordered = {n: signature[n] for n in kernel.arg_names}
    sixteen = {
        (at,): [["tt.divisibility", 16]]
        for at, n in enumerate(kernel.arg_names)
        if n in given and n != "rows"
    }
    source = ASTSource(kernel, ordered, constants, sixteen)
    return triton.compile(source, target=GPUTarget(*target), options=options)


def built_experts(kernel: str, target: str, half: str) -> tuple[Any, list[str]]:
    """Returns the compiled product by experts, and what it spills."""
    from expert_build import HALVES, build

    made, used = build(kernel, target, next(name for name, kind in HALVES.items() if kind == half))
    spilled = used["spilled_bytes"]
    return made, [f"{spilled} bytes spilled"] if spilled else []


def faults(made: Sequence[Any], kind: str) -> list[list[str]]:
    """Returns the faults in the machine code of each of these kernels, built for one target."""
    if kind != "cuda":
        return [amd_faults(kernel.asm["amdgcn"]) for kernel in made]
    (arch,) = {re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])[1] for kernel in made}
    kernels = machine_code.triton_kernels(arch, [kernel.asm["cubin"] for kernel in made])
    return [machine_code.faults([kernel]) for kernel in kernels]


def amd_faults(assembly: str) -> list[str]:
    """Returns stores of bytes and spilled registers. Triton reaches tensors by buffer
    instructions, which are scratch memory in kernels of hipcc, so its metadata is read."""
    spilled = re.findall(r"vgpr_spill_count: *[1-9]\d*", assembly)
    return spilled + re.findall(r"\w+_store_byte\w*", assembly)


def main(*wanted: str) -> None:
    """Prints what was built, in float16 for one chip of each kind and in bfloat16 for others."""
    found = {}
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    for target in (t for t, since in TARGETS.items() if release >= since):
        name, half = f"{target[0]}-{target[1]}", "*bf16"
        if wanted and name not in wanted:
            continue
        if target[1] in (80, "gfx906"):
            half = "*fp16"
        kernels = {
            kernel.__name__: built(kernel, constants, target, half)
            for kernel, constants in KERNELS.items()
        }
        kernels["rows of experts"], spilled = built_experts("many", name, half)
        if target[1] != "gfx906" and release >= quantized.TRITON_SINCE:  # gfx906: no matrix cores
            kernels["many_rows 4 bits"] = built_product(target, half, 4, 1024)
            kernels["many_rows 8 bits"] = built_product(target, half, 8, 128)
        code = "cubin" if target[0] == "cuda" else "hsaco"
        wrong = dict(zip(kernels, faults(list(kernels.values()), target[0]), strict=True))
        wrong["rows of experts"] += spilled
        found[name] = {n: (len(made.asm[code]), wrong[n]) for n, made in kernels.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
