"""Reads what compilers made of the GPU kernels, and finds what a right and fast kernel does not
contain. Tests that execute the sources on the CPU cannot see any of it: nvcc once stored each half
as its value truncated to a byte."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

STORES_BYTES: frozenset[str] = frozenset()
"""kernels that store bytes by design. None does: codes of quantised weights are only read"""
PRINTS = {"gather", "row_losses", "exact_row_losses"}
"""kernels that end with a message where an index is out of range: its arguments lie in local
memory, and HIP reads the format byte by byte"""
READS_HALVES = {
    "few_rows": "a scale per group, the bias and the result of an output",
    "tensor_rows": "scales, biases and results of outputs",
    "as_values": "a scale per group",
    "row_losses": "the label's logit",
}
"""wide kernels that also load or store single halves, and which"""
READS_SIXTEEN_BYTES = {"few_rows", "tensor_rows"}
"""kernels that are bound by memory, and must load 16 bytes at a time"""
SIXTEEN_BYTES = re.compile(r"LDG\.E(\.\w+)*\.128|global_load_dwordx4")
BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
SASS_LINE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
HIP_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    arch: str
    name: str
    """such as `few_rows<f16, f16, 4, 32>`"""
    mnemonics: tuple[str, ...]
    """the instructions without operands"""

    @property
    def base(self) -> str:
        """Returns the name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def wide(self) -> bool:
        """Returns whether a thread moves several elements at a time. The last template argument
        counts them; 2 are int4's narrow variant, whose codes are one byte."""
        last = re.search(r"[ <](\d+)>$", self.name)
        return bool(last and int(last[1]) > 2)


@dataclass(frozen=True)
class Access:
    """A load or a store: of how many bytes, and whether in a thread's own (local) memory."""

    store: bool
    local: bool
    size: int


def access(mnemonic: str) -> Access | None:
    """Returns what an instruction loads or stores; None where it does neither."""
    if found := re.match(r"(LD|ST)([GL]?)(\..*)?$", mnemonic):
        sizes = [SASS_BYTES[s] for s in mnemonic.split(".") if s in SASS_BYTES]
        return Access(found[1] == "ST", found[2] == "L", min(sizes, default=4))
    if found := re.match(r"(global|flat|buffer|scratch)_(load|store)_([a-z]+)", mnemonic):
        local = found[1] in ("buffer", "scratch")  # kernels reach tensors by the other two
        return Access(found[2] == "store", local, HIP_BYTES.get(found[3], 4))
    return None


def fault(kernel: Kernel, mnemonic: str) -> str | None:
    """Returns what is wrong with an instruction in this kernel; None where nothing is."""
    if re.match(r"F2I\.(?=.*\bF16\b)(?=.*\b[US]8\b)", mnemonic):
        return "converts a half to a byte"
    found = access(mnemonic)
    if found is None:
        return None
    if found.local:
        return None if kernel.base in PRINTS else "uses local memory"
    if found.store and found.size == 1 and kernel.base not in STORES_BYTES:
        return "stores a byte"
    if not kernel.wide or found.size > 2:
        return None
    excused = kernel.base in (READS_HALVES if found.size == 2 else PRINTS)
    return None if excused else "moves one element in a wide kernel"


def faults(kernels: Iterable[Kernel]) -> list[str]:
    """Returns a line per kernel and kind of instruction that should not be there, or is missing."""
    found = []
    for k in kernels:
        for mnemonic, count in Counter(k.mnemonics).items():
            if what := fault(k, mnemonic):
                found.append(f"{k.arch} {k.name}: {what}: {count} x {mnemonic}")
        if k.base in READS_SIXTEEN_BYTES and not any(map(SIXTEEN_BYTES.match, k.mnemonics)):
            found.append(f"{k.arch} {k.name}: loads no 16 bytes at a time")
    return found


def nvidia_tool(name: str) -> str | None:
    """Returns the path of a CUDA tool: Triton's wheel carries it, or it is on PATH."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    for folder in folders or []:
        path = Path(folder, "backends", "nvidia", "bin", name)
        if path.exists():
            return str(path)
    return shutil.which(name)


def output(*command: str, given: str | None = None) -> str:
    """Returns what a command prints; CalledProcessError where it fails."""
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """Returns a demangled name without namespaces, arguments and result type."""
    name = name.replace("(anonymous namespace)::", "")
    return re.sub(r"\b\w+::", "", name).partition("(")[0].removeprefix("void ")


def from_sass(text: str) -> Iterator[Kernel]:
    """Yields the kernels of what `cuobjdump -sass` prints."""
    for code in re.split(r"(?m)^\s*code for ", text)[1:]:
        arch = code.split(None, 1)[0]
        for function in re.split(r"Function : ", code)[1:]:
            name, _, body = function.partition("\n")
            found = [m[1] for line in body.splitlines() if (m := SASS_LINE.match(line))]
            yield Kernel(arch, short(name), tuple(found))


def from_amdgpu(arch: str, text: str) -> Iterator[Kernel]:
    """Yields the kernels of what `llvm-objdump -d` prints, without the runtime's own functions."""
    for function in re.split(r"(?m)^[0-9a-f]+ <", text)[1:]:
        name, _, body = function.partition(">:\n")
        if not name.startswith(("__ockl", ".text")):
            yield Kernel(arch, short(name), tuple(re.findall(r"(?m)^\s+([a-z]\w+)", body)))


def cuda_kernels(built: Path) -> list[Kernel]:
    """Returns the kernels of an object or cubin file of nvcc."""
    sass = output(str(nvidia_tool("cuobjdump")), "-sass", str(built))
    return list(from_sass(output("c++filt", given=sass)))


def code_of(cubin: bytes) -> tuple[str, bytes]:
    """Returns name and machine code of the one kernel in a 64-bit ELF file: the section that is
    called .text and its name."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    text = {}
    for at, offset, length in sections:
        name, _, _ = cubin[sections[names][1] + at :].partition(b"\0")
        if name.startswith(b".text."):
            text[name.decode().removeprefix(".text.")] = cubin[offset : offset + length]
    (kernel,) = text.items()
    return kernel


def triton_kernels(arch: str, cubins: Sequence[bytes]) -> list[Kernel]:
    """Returns the kernels of Triton's cubins of one architecture, such as sm_90a, disassembled
    together: nvdisasm takes nearly a second, whatever the size of a kernel."""
    names, codes = zip(*map(code_of, cubins), strict=True)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        chip = arch.upper().replace("_", "").replace("A", "a")
        text = output(str(nvidia_tool("nvdisasm")), "-ndf", "-b", chip, file.name)
    lines = [m[1] for line in text.splitlines() if (m := SASS_LINE.match(line))]
    ends = list(accumulate((len(code) // 16 for code in codes), initial=0))  # of an instruction
    assert len(lines) == ends[-1], "some lines are no instructions, or some instructions no lines"
    return [
        Kernel(arch, name, tuple(lines[a:b]))
        for name, (a, b) in zip(names, pairwise(ends), strict=True)
    ]


def hip_parts(built: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (architecture, ELF file) of an object file of hipcc: the bundle's header is a count,
    and per entry offset, size and length of the target's name, each in 8 bytes."""
    start = built.index(BUNDLE)
    (count,) = struct.unpack_from("<Q", built, start + len(BUNDLE))
    at = start + len(BUNDLE) + 8
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", built, at)
        target = built[at + 24 : at + 24 + length].decode()
        at += 24 + length
        if target.startswith("hip"):
            yield target.rpartition("-")[2], built[start + offset : start + offset + size]


def hip_kernels(built: Path) -> list[Kernel]:
    """Returns the kernels of an object file of hipcc; leaves the parts beside it as .gfx files."""
    kernels: list[Kernel] = []
    for arch, part in hip_parts(built.read_bytes()):
        path = built.with_suffix(f".{arch}")
        path.write_bytes(part)
        kernels += from_amdgpu(arch, output("llvm-objdump", "-d", "-C", str(path)))
    return kernels
