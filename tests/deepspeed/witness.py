"""Reads and writes the witness: what real DeepSpeed did with the scripts of this folder, recorded.

A file of witness/ is JSON. It names the versions that ran, the day, the command that records it
again, and its sources' digests. Weights are little-endian float32 in base64.
What DeepSpeed saved is in one archive, checkpoints.tar.xz, with a JSON file of its own."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
FOLDER = HERE / "witness"
ARCHIVE = FOLDER / "checkpoints.tar.xz"
COMMAND = "python tests/deepspeed/record.py"
LISTS = ("losses", "norms", "rates")


class StaleWitnessError(AssertionError):
    """A record is missing, or its sources have changed since."""


def digests(sources: list[Path]) -> dict[str, str]:
    """Returns each source's SHA-256 by its path in tests/deepspeed."""
    return {
        path.relative_to(HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sources
    }


def write(name: str, sources: list[Path], origin: dict[str, str], facts: dict[str, Any]) -> None:
    """Writes a record, one line for each of its fields."""
    record = {
        "about": f"what real DeepSpeed did; recorded by `{COMMAND}`, which records it again",
        **origin,
        "sources": digests(sources),
        **facts,
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name: str, sources: list[Path], folder: Path = FOLDER) -> dict[str, Any]:
    """Returns a record. One that is missing or older than a source is an error."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise StaleWitnessError(f"witness/{name}.json: it is missing; record again: {COMMAND}")
    record: dict[str, Any] = json.loads(path.read_text())
    today = digests(sources)
    changed = [source for source in today if record["sources"].get(source) != today[source]]
    if changed:
        raise StaleWitnessError(
            f"witness/{name}.json: {', '.join(changed)} changed since; record again: {COMMAND}"
        )
    return record


def pack(seen: dict[str, Any]) -> dict[str, Any]:
    """Returns what a rank saw of one script as JSON has it."""
    lists = {k: [float(f"{v:.9g}") for v in seen[k].tolist()] for k in LISTS}
    return {**lists, "weights": {name: pack_weight(w) for name, w in seen["weights"].items()}}


def unpack(rank: dict[str, Any]) -> dict[str, Any]:
    """Returns what `pack` was given."""
    lists = {k: torch.tensor(rank[k]) for k in LISTS}
    return {**lists, "weights": {name: unpack_weight(w) for name, w in rank["weights"].items()}}


def pack_weight(weight: Tensor) -> dict[str, Any]:
    data = weight.numpy().astype("<f4").tobytes()
    return {"shape": list(weight.shape), "float32": base64.b64encode(data).decode()}


def unpack_weight(packed: dict[str, Any]) -> Tensor:
    values = np.frombuffer(base64.b64decode(packed["float32"]), "<f4")
    return torch.from_numpy(values.astype(np.float32)).reshape(packed["shape"])


def pack_ranks(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Packs what each rank saw. In place of weights that an earlier rank has too stands its
    number."""
    packed = [pack(rank) for rank in ranks]
    first = [next(i for i, r in enumerate(packed) if r["weights"] == p["weights"]) for p in packed]
    return [
        {**p, "weights": p["weights"] if f == i else f}
        for i, (p, f) in enumerate(zip(packed, first, strict=True))
    ]


def unpack_ranks(packed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what `pack_ranks` was given."""
    weights = [p["weights"] for p in packed]
    return [
        unpack({**p, "weights": weights[w] if isinstance(w, int) else w})
        for p, w in zip(packed, weights, strict=True)
    ]


def write_archive(folder: Path, out: Path) -> str:
    """Packs the folder's files without DeepSpeed's own code; returns the archive's digest."""
    with tarfile.open(out, "w:xz", preset=9) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".py"):
            data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.sha256(out.read_bytes()).hexdigest()


def unpack_archive(archive: Path, folder: Path) -> None:
    """Writes the archive's files into the folder."""
    with tarfile.open(archive) as packed:
        for member in packed:
            content = packed.extractfile(member)
            assert content is not None
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
