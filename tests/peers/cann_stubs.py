"""Writes stub CANN libraries, so that the real torch_npu loads on a machine without Ascend
software: `python cann_stubs.py TORCH_NPU_FOLDER OUT`.

Every function that torch_npu's libraries import, or look up by name at run time, exists and returns
0, which is success; those whose result is used answer for one device. Handles of streams, events
and contexts must not be null: with a null stream autograd's device threads abort. No operator
(`aclnn*`) exists, so nothing can be computed by mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ANSWERS = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
static uintptr_t last = 0x1000;
static int give(void** handle) { *handle = (void*)(last += 16); return 0; }
int aclrtCreateStream(void** s) { return give(s); }
int aclrtCreateStreamWithConfig(void** s, uint32_t p, uint32_t f) { return give(s); }
int aclrtCreateEventExWithFlag(void** e, uint32_t f) { return give(e); }
int aclrtGetCurrentContext(void** c) { *c = (void*)0x1000; return 0; }
int aclrtGetDeviceCount(uint32_t* n) { *n = 1; return 0; }
int aclrtGetDevice(int32_t* d) { *d = 0; return 0; }
size_t aclGetCompileoptSize(int o) { return 256; }
int aclGetCompileopt(int o, char* value, size_t n) { value[0] = 0; return 0; }
const char* aclrtGetSocName(void) { return "Ascend910B3"; }
"""
CANN = re.compile(r"acl(?!nn)\w+|rt[A-Z]\w+|Msprof\w+|Hccl\w+|_ZN3atb\w+|_ZN2ge\w+")
LOOKED_UP = re.compile(rb"\x00((?:acl(?!nn)|Hccl)[A-Za-z0-9]+)(?=\x00)")
NEEDED = re.compile(r"NEEDED.*\[(lib(?:hccl|acl\w*|ge_runner|graph|atb)\.so)\]")


def output(*command: str | Path) -> str:
    """Returns what the command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path, which: str) -> set[str]:
    """Returns the names of the dynamic symbols, without versions."""
    lines = output("nm", "-D", which, library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def missing(libraries: Iterable[Path]) -> set[str]:
    """Returns the CANN functions that torch_npu needs but does not contain."""
    wanted: set[str] = set()
    defined: set[str] = set()
    for library in libraries:
        imported = symbols(library, "--undefined-only")
        wanted |= {s for s in imported if CANN.fullmatch(s)}
        wanted |= {m.decode() for m in LOOKED_UP.findall(library.read_bytes())}
        defined |= symbols(library, "--defined-only")
    return wanted - defined


def compile_library(source: Path, library: Path, *options: str) -> None:
    """Builds one shared library; -w because the stubs declare no parameters."""
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(source), *options]
    subprocess.run(command, check=True)


def main(package: Path, out: Path) -> None:
    """Writes the libraries: libascendcl.so has all functions, the others are empty and linked to
    it."""
    libraries = [*(package / "lib").glob("*.so"), *package.glob("_C*.so")]
    answered = set(re.findall(r"\b(acl\w+)\(", ANSWERS))
    plain = sorted(missing(libraries) - answered)
    out.mkdir(parents=True, exist_ok=True)
    source, empty = out / "stubs.c", out / "empty.c"
    source.write_text(ANSWERS + "".join(f"long {s}(void) {{ return 0; }}\n" for s in plain))
    empty.write_text("")
    compile_library(source, out / "libascendcl.so")
    needed = {n for library in libraries for n in NEEDED.findall(output("readelf", "-d", library))}
    for name in needed - {"libascendcl.so"}:
        compile_library(empty, out / name, "-Wl,--no-as-needed", f"-L{out}", "-lascendcl")
    print(f"{len(plain) + len(answered)} stubs in {len(needed)} libraries", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
