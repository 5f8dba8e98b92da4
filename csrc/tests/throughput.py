"""Predicts how fast the kernels' inner loops run on Arm chips, from llvm-mca's models of the chips.

Each loop is compiled with the cross compiler and setup.py's flags. The innermost loop with the most
multiply-adds is taken from the assembly, so the sources carry no markers. llvm-mca assumes that all
data lie in the first cache. Usage: throughput.py [CPU ...]"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1]
CPUS = ("tsv110", "neoverse-v1", "apple-m1")
MARCH = {"neon": "armv8-a", "dotprod": "armv8.2-a+dotprod", "i8mm": "armv8.2-a+dotprod+i8mm+bf16"}
FLAGS = (
    "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi"
    " -fno-tree-slp-vectorize"
)
ITERATIONS = 1000
OPERANDS = {
    "fmla": ("{}.4s, v30.4s, v31.4s", "{}.4s, v30.4s, v31.s[0]"),
    "sdot": ("{}.4s, v30.16b, v31.16b",),
    "smmla": ("{}.4s, v30.16b, v31.16b",),
    "bfdot": ("{}.4s, v30.8h, v31.8h",),
}


class Loop(NamedTuple):
    """An inner loop: its name, the C++ call that holds it, and the instruction of its peak."""

    name: str
    isa: str
    source: str
    call: str
    multiply: str


def linear(t: str, pairs: str) -> str:
    return (
        f"(const LinearFew<{t}>& a, int64_t f, int64_t apart)"
        f" {{ tile<{pairs}, FEATURES, 1>(a, f, apart, 0); }}"
    )


def quant(kind: str, bits: int, rows: int) -> str:
    return (
        "(const Product& a, int64_t f, int64_t apart)"
        f" {{ tile<{bits}, ROW, FEATURES, {rows}>({kind}<{bits}, ROW>{{a}}, a, f, apart, 0); }}"
    )


SCORES = (
    "(const float* k, int64_t stride, int64_t keys, int64_t width, const float* q, float* p)"
    " { scores<1>(k, stride, keys, width, q, width, p, keys); }"
)
VALUES = (
    "(const float* v, int64_t stride, int64_t keys, const float* p, float* y)"
    " { strip<1, at_a_time<1>>(v, stride, keys, W, p, keys, y, W); }"
)


def attention(words: str) -> str:
    return (
        "(int64_t depth, Strided a, const float* b, float* c)"
        f" {{ product_tile<{words}, ROWS, COLUMNS>(depth, a, b, BLOCK, c, BLOCK, false); }}"
    )


LOOPS = [
    Loop("linear float32, 1 row", "neon", "linear", linear("float", "false"), "fmla"),
    Loop("linear bfloat16, 1 row", "neon", "linear", linear("bf16", "false"), "fmla"),
    Loop("linear bfloat16, 1 row", "i8mm", "linear", linear("bf16", "true"), "bfdot"),
    Loop("int8, 1 row", "neon", "quant", quant("Whole", 8, 1), "fmla"),
    Loop("int8, 4 rows", "neon", "quant", quant("Whole", 8, 4), "fmla"),
    Loop("int4, 1 row", "neon", "quant", quant("Whole", 4, 1), "fmla"),
    Loop("int4, 4 rows", "neon", "quant", quant("Whole", 4, 4), "fmla"),
    Loop("int8 rounded, 1 row", "dotprod", "quant", quant("Blocks", 8, 1), "sdot"),
    Loop("int8 rounded, 4 rows", "i8mm", "quant", quant("Blocks", 8, 4), "smmla"),
    Loop("int4 rounded, 1 row", "dotprod", "quant", quant("Blocks", 4, 1), "sdot"),
    Loop("int4 rounded, 4 rows", "i8mm", "quant", quant("Blocks", 4, 4), "smmla"),
    Loop("attention float32", "neon", "attention", attention("Single"), "fmla"),
    Loop("attention bfloat16", "i8mm", "attention", attention("Pair"), "bfdot"),
    Loop("decode attention q k", "neon", "attention_decode", SCORES, "fmla"),
    Loop("decode attention p v", "neon", "attention_decode", VALUES, "fmla"),
]


def assembly(loop: Loop, folder: Path) -> str:
    """Returns the assembly of the function that makes the loop's call."""
    source = folder / "loop.cpp"
    source.write_text(
        f'#include "kernels.h"\n#undef GLM_INSTANTIATE\n#define GLM_INSTANTIATE(name, Args)\n'
        f'#include "../cpu/{loop.source}.cpp"\n'
        'namespace glm::GLM_ISA { extern "C" __attribute__((flatten)) void measured'
        f"{loop.call} }}\n",
        encoding="utf-8",
    )
    compiler = os.environ.get("CXX", "aarch64-linux-gnu-g++")
    command = [compiler, *FLAGS.split(), f"-march={MARCH[loop.isa]}", f"-DGLM_ISA={loop.isa}"]
    command += [f"-I{CSRC}/include", "-S", "-o", "-", str(source)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^measured:\n(.*?)^\t\.size\tmeasured", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"{loop.name}: the compiler emitted no code; look at {loop.source}.cpp")
    return found[1]


def innermost(text: str, multiply: str) -> list[str]:
    """Returns the instructions of the innermost loop with the most multiply-adds."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        target = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]] + 1, i + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[x for x in lines[a:b] if x and x[0] not in ".#/"] for a, b in inner]
    return max(bodies, key=lambda body: count(body, multiply))


def count(body: list[str], *names: str) -> int:
    return sum(line.split()[0] in names for line in body)


def predicted(mca: str, cpu: str, body: list[str]) -> tuple[float, float, str]:
    """Returns cycles per iteration, those that the busiest resource needs, and its name."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm,+bf16"]
    command += [f"-iterations={ITERATIONS}", "-instruction-info=false"]
    # GCC writes the byte 0xf0 as a sign-extended word, which LLVM's assembler refuses
    text = re.sub(r"0xf{14}(\w\w)\b", r"0x\1", "\n".join(body)) + "\n"
    out = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

    def number(name: str) -> float:
        found = re.search(rf"{name}:\s+([\d.]+)", out)
        assert found, name
        return float(found[1])

    names = dict(re.findall(r"^(\[[\d.]+\])\s+- (\w+)", out, re.MULTILINE))
    rows = out.partition("Resource pressure per iteration:\n")[2].splitlines()
    pressure = dict(zip(rows[0].split(), rows[1].split(), strict=True))
    busiest = max((float(p), names[r]) for r, p in pressure.items() if p != "-")
    front = len(body) / number("Dispatch Width")
    resource = max(busiest, (front, "front end"))
    cycles = number("Total Cycles") / ITERATIONS
    return cycles, max(resource[0], number("Block RThroughput")), resource[1]


def peak(mca: str, cpu: str, multiply: str) -> float:
    """Returns how many such instructions the model runs per cycle, if they wait for nothing."""

    def rate(operands: str) -> float:
        body = [f"{multiply} {operands.format(f'v{i}')}" for i in range(24)]
        return len(body) / predicted(mca, cpu, body)[0]

    return max(map(rate, OPERANDS[multiply]))


def main() -> None:
    """Prints a table with a row per loop and chip."""
    names = [f"llvm-mca-{v}" for v in range(30, 13, -1)] + ["llvm-mca"]
    mca = os.environ.get("LLVM_MCA") or next(filter(None, map(shutil.which, names)), None)
    if mca is None:
        raise SystemExit("llvm-mca: not installed; install it (Debian: llvm) or set LLVM_MCA")
    print("| loop | variant | chip | cycles | multiply-adds | of peak | bound by | of bound |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for loop in LOOPS:
            body = innermost(assembly(loop, Path(folder)), loop.multiply)
            multiplies = count(body, loop.multiply)
            for cpu in sys.argv[1:] or CPUS:
                cycles, bound, resource = predicted(mca, cpu, body)
                share = multiplies / cycles / peak(mca, cpu, loop.multiply)
                row = [loop.name, loop.isa, cpu, f"{cycles:.1f}", f"{multiplies} {loop.multiply}"]
                row += [f"{share:.0%}", resource, f"{bound / cycles:.0%}"]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
