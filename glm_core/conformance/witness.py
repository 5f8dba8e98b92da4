"""Defines the witness file: results as a device gave them, with its environment and a hash, so that
they can be judged again without the device. The format is described in docs/witness.md."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm_core import __version__
from glm_core.backends.base import Backend
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import Results, output_gradient, tensors_by_name
from glm_core.conformance.report import Report
from glm_core.errors import WitnessError
from glm_core.measure.timing import machine

KIND, VERSION = "glm_core witness", 1
MAX_ELEMENTS = 70_000
"""a case is recorded if none of its results has more elements"""


@dataclasses.dataclass(kw_only=True, slots=True)
class Witness:
    """What one device gave. Tensors are named `case|ID|RESULT`, and `call|INDEX|arg|NAME`,
    `call|INDEX|gradient|OUTPUT`, `call|INDEX|result|NAME` for the op calls of a training step."""

    backend: str
    environment: dict[str, Any]
    """device, host, versions, commit, date"""
    tensors: Results = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """by case id: the hash of its inputs"""
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    """by case id: why the backend did not run it"""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """see `align.witness.CallRow`"""

    def keep(self, case: Case, results: Results) -> None:
        """Adds the results of a case, unless one has more than MAX_ELEMENTS elements."""
        if any(t.numel() > MAX_ELEMENTS for t in results.values()):
            return
        self.inputs[case.id] = inputs_hash(case)
        for name, t in results.items():
            self.tensors[f"case|{case.id}|{name}"] = t.detach().cpu().clone().contiguous()

    def keep_unsupported(self, report: Report) -> None:
        """Adds the reasons of the cases that the backend did not run."""
        self.unsupported |= {r.id: r.reason for r in report.results if r.outcome == "unsupported"}

    def cases(self) -> dict[str, Results]:
        """Returns the results by case id."""
        found: dict[str, Results] = {}
        for name, t in self.tensors.items():
            kind, _, place = name.partition("|")
            if kind == "case":
                id, _, result = place.partition("|")
                found.setdefault(id, {})[result] = t
        return found

    def save(self, path: Path | str) -> None:
        """Writes the file, replacing an older one only once the new one is complete."""
        path = Path(path)
        fields = json.dumps({name: getattr(self, name) for name in FIELDS})
        metadata = {"kind": KIND, "version": str(VERSION), "fields": fields}
        metadata["sha256"] = content_hash(fields, self.tensors)
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(self.tensors, unfinished, metadata)
        os.replace(unfinished, path)


FIELDS = ("backend", "environment", "inputs", "unsupported", "calls")


def new(backend: Backend) -> Witness:
    """Returns an empty witness that describes this machine and the backend's device."""
    facts = {"device": device_name(backend), "verified": backend.verified, **machine()}
    facts |= {"glm_core": __version__, "date": datetime.datetime.now(datetime.timezone.utc).date()}
    return Witness(backend=backend.name, environment={k: str(v) for k, v in facts.items()})


def device_name(backend: Backend) -> str:
    """Returns the device's name as far as torch's module for it knows one."""
    if backend.device_type in ("cpu", "meta"):
        return backend.device_type
    get_name = getattr(torch.get_device_module(backend.device_type), "get_device_name", None)
    return str(get_name()) if get_name else backend.device_type


def inputs_hash(case: Case) -> str:
    """Returns a hash of the case's inputs: its arguments and, in grad mode, the output
    gradients."""
    args = case.sample.make(case.dtype)
    scalars = {n: v for n, v in args.items() if isinstance(v, (int, float, str))}
    tensors = {n: t for name, v in args.items() for n, t in tensors_by_name(name, v).items()}
    if case.mode == "grad":
        with torch.no_grad():
            outputs = tensors_by_name("out", case.op.reference(**args))
        for i, (name, y) in enumerate(outputs.items()):
            tensors[f"gradient of {name}"] = output_gradient(i, y, strided=False)
    return content_hash(json.dumps(scalars), tensors)[:16]


def content_hash(fields: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 over the plain fields and every tensor's name, dtype, shape and bytes."""
    h = hashlib.sha256(fields.encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        packed = t.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        h.update(packed.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def load(path: Path | str) -> Witness:
    """Reads and checks a witness file. Raises WitnessError."""
    path = Path(path)
    metadata, tensors = _open(path)
    if (version := metadata.get("version")) != str(VERSION):
        raise WitnessError(
            f"witness {path}: its format is version {version}, this glm_core reads {VERSION}; "
            "judge it with the glm_core that wrote it, or record it again"
        )
    text = metadata.get("fields", "")
    if metadata.get("sha256") != content_hash(text, tensors):
        raise WitnessError(
            f"witness {path}: the sha256 of its content differs from the one written in it; "
            "copy the file again from where it was recorded"
        )
    try:
        values = json.loads(text)
        return Witness(tensors=tensors, **{name: values[name] for name in FIELDS})
    except (ValueError, KeyError, TypeError) as error:
        raise WitnessError(
            f"witness {path}: malformed fields ({error!r}); record it again"
        ) from None


def _open(path: Path) -> tuple[dict[str, str], Results]:
    """Returns the metadata and, where the version is ours, the tensors."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] != b"{":  # a safetensors file begins with the length of a JSON header
            raise WitnessError(_foreign(path))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise WitnessError(_foreign(path))
            names = file.keys() if metadata.get("version") == str(VERSION) else []
            return metadata, {name: file.get_tensor(name) for name in names}
    except OSError as error:
        reason = error.strerror or str(error)
        raise WitnessError(f"witness {path}: {reason}; {_WHERE_FROM}") from None
    except (SafetensorError, ValueError) as error:
        raise WitnessError(
            f"witness {path}: truncated or damaged ({error}); copy the file again"
        ) from None


_WHERE_FROM = "pass a file of glm-core conformance --record FILE or glm-core doctor --hardware"


def _foreign(path: Path) -> str:
    return f"witness {path}: this is no witness file; {_WHERE_FROM}"
