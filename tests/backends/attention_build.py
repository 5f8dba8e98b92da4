"""Builds attention's Triton kernels ahead of time as they would be launched: `python
attention_build.py cuda-90,hip-gfx90a 128,33 float32,bfloat16` prints the registers and the bytes
shared and spilled per target, dtype, head size and kernel, the faults that machine_code finds, and
the parameters that are data.
Without arguments: all targets that this Triton knows, with sizes and dtypes for every cut."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_build import TARGETS, faults

from glm_core.backends.cuda import attention_launch as launch

KERNELS = {
    "attend_rows": (launch.attend_rows, {"SPLIT": False}),
    "attend_rows_split": (launch.attend_rows, {"SPLIT": True}),
    "few_rows": (launch.attend_rows, {"SPLIT": True}),
    "join_splits": (launch.join_splits, {"BLOCK": launch.JOINED}),
    "grad_rows": (launch.grad_rows, {}),
    "grad_keys": (launch.grad_keys, {"SCAN": launch.SCAN}),
}
INTEGERS = ("queries", "keys", "kv_heads", "group", "splits", "parts")
POINTERS = {
    **dict.fromkeys(("tops", "shares", "deltas", "values", "maxima", "sums"), "*fp32"),
    **dict.fromkeys(("key_start", "key_end"), "*i32"),
}
LATENT = {576: 512}
"""head size of the keys of absorbed latent attention -> that of its values; it has no gradient"""
HALVES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 192, 256)


def family(target: str, dtype: str) -> str:
    """Returns the entry of CUTS that serves a target."""
    if target.startswith("cuda"):
        return "fma" if dtype == "float32" else "mma"
    return "mfma" if target[4:] in launch.MATRIX_CORES else "vector"


def signature(kernel: Any, constants: dict[str, Any], pointer: str) -> tuple[Any, Any]:
    """Returns the arguments' types, and which are multiples of 16, as in an ordinary call."""
    types, sixteen = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("c", "scale"):
            types[name] = "fp32"
        elif name in INTEGERS:
            types[name] = "i32"
        else:
            partial = constants.get("SPLIT") and name == "y"
            is_stride = re.fullmatch("[dqkv]_[blhs]", name)
            types[name] = (
                "i32" if is_stride else POINTERS.get(name, "*fp32" if partial else pointer)
            )
            sixteen[at,] = [["tt.divisibility", 16]]
    return types, sixteen


def cuda_usage(made: Any) -> dict[str, int]:
    """Asks cuobjdump, which Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled_bytes": stack + local}


def hip_usage(made: Any) -> dict[str, int]:
    """Reads the compiler's notes in the assembly."""
    text = made.asm["amdgcn"]
    names = {"registers": "vgpr_count", "spilled_bytes": "private_segment_fixed_size"}
    return {k: int(re.search(rf"\.{v}:\s+(\d+)", text)[1]) for k, v in names.items()}  # type: ignore[index]


def build(name: str, target: str, dtype: str, e: int) -> tuple[Any, dict[str, Any]]:
    """Compiles one kernel and returns it with what it uses."""
    kernel, constants = KERNELS[name]
    call = launch.Call(1, 1, 1, 1, 1, e, LATENT.get(e, e), family(target, dtype), 1)
    options = call.options(call.cut(name.removesuffix("_split").replace("join_splits", "few_rows")))
    options |= {"C": call.c, "CP": launch._power(call.c)}
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    chosen = {k: v for k, v in {**options, **constants}.items() if k in kernel.arg_names}
    types, sixteen = signature(kernel, chosen, HALVES[dtype])
    kind, chip = target.split("-")
    made = triton.compile(
        ASTSource(kernel, types, chosen, sixteen),
        target=GPUTarget(kind, int(chip) if kind == "cuda" else chip, 32 if kind == "cuda" else 64),
        options={"num_warps": warps, "num_stages": stages},
    )
    used = cuda_usage(made) if kind == "cuda" else hip_usage(made)
    return made, {**used, "shared_bytes": made.metadata.shared}


def with_faults(
    target: str, dtype: str, built: dict[str, tuple[Any, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Returns by target, dtype and kernel what it uses, and the faults of its machine code."""
    wrong = faults([made for made, _ in built.values()], target.partition("-")[0])
    found = {
        f"{target} {dtype} {name}": used | {"faults": lines}
        for (name, (_, used)), lines in zip(built.items(), wrong, strict=True)
    }
    for name, used in found.items():
        print(name, used, file=sys.stderr, flush=True)
    return found


def data() -> list[str]:
    """Returns the parameters whose values lead to no other compilation."""
    return sorted({p.name for k, _ in KERNELS.values() for p in k.params if p.do_not_specialize})


def main(targets: str = "", sizes: str = "", dtypes: str = "float32,bfloat16,float16") -> None:
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    known = [f"{kind}-{chip}" for (kind, chip, _), since in TARGETS.items() if release >= since]
    found: dict[str, Any] = {"data": data()}
    for target in targets.split(",") if targets else known:
        for dtype in dtypes.split(","):
            if (target, dtype) == ("hip-gfx906", "bfloat16"):
                continue  # the chip has none
            for e in map(int, sizes.split(",")) if sizes else SIZES:
                names = [n for n in KERNELS if e not in LATENT or "grad" not in n]
                built = {f"{e} {name}": build(name, target, dtype, e) for name in names}
                found |= with_faults(target, dtype, built)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
