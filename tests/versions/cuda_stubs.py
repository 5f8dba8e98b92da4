"""Writes stub CUDA libraries, so that the registry's torch for x86-64 loads on a CPU without CUDA's
own, which are 2.7 GB: `python cuda_stubs.py SITE_PACKAGES`.

Every function that torch's libraries import exists. It returns cudaErrorNoDevice, as CUDA's own do
where there is no GPU; those that return a text return one. Torch's metadata no longer asks for
NVIDIA's packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NEEDED = re.compile(r"NEEDED.*\[(lib(?:cu|nv|nccl)\w*\.so\.\d+)\]")
IMPORTED = re.compile(r" U ((?:__cuda|cu|nccl|nv)\w+)")
FUNCTION = "long {}(void) {{ return 100; }}\n"
TEXT = 'const char* {}(void) {{ return "a stub of CUDA: this environment has no GPU"; }}\n'


def output(*command: str | Path) -> str:
    """Returns what the command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(site: Path) -> None:
    """Writes each library that torch needs beside torch's own. The version of its symbols is the
    library's name, as in CUDA's."""
    folder = site / "torch" / "lib"
    libraries = sorted(folder.glob("*.so"))
    imported = {s for path in libraries for s in IMPORTED.findall(output("nm", "-D", path))}
    needed = {n for path in libraries for n in NEEDED.findall(output("readelf", "-d", path))}
    source = folder / "cuda_stubs.c"
    kinds = {s: TEXT if s.endswith(("String", "Name")) else FUNCTION for s in sorted(imported)}
    source.write_text("".join(kind.format(s) for s, kind in kinds.items()), encoding="utf-8")
    for name in sorted(needed):
        options = [f"-Wl,-soname,{name},--default-symver", "-shared", "-fPIC", "-w"]
        subprocess.run(["cc", *options, "-o", str(folder / name), str(source)], check=True)
    [metadata] = site.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"Requires-Dist: nvidia-.*\n", "", text), encoding="utf-8")
    print(f"{len(imported)} stubs in {len(needed)} libraries", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
