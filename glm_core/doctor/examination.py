"""Runs conformance, alignment and utilisation of one backend and writes them into one file. A part
that fails is recorded, and the other parts still run."""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from glm_core import __version__, align
from glm_core.align import report as align_report
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.bench import step as bench_step
from glm_core.config import Dtype, RunConfig
from glm_core.conformance import render
from glm_core.conformance.run import run
from glm_core.measure.timing import interleave, machine
from glm_core.model.presets import preset

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """The settings of an examination."""

    backend: str
    config: RunConfig
    """the run whose loss curves are compared"""
    controls: int = 8
    op: str | None = None
    """name of the only op to examine; None: all"""
    preset: str = "glm4-34m"
    """the model whose training step is timed"""
    rounds: int = 10

    def dtypes(self, backend: Backend) -> list[Dtype]:
        """Returns float32 and the backend's half precision, bfloat16 if it has both."""
        halves: Sequence[Dtype] = ("bfloat16", "float16")
        half = [d for d in halves if getattr(torch, d) in backend.dtypes]
        return ["float32", *half[:1]]


class Findings:
    """The results of the parts and the files of the archive."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def run(self, name: str, part: Callable[[], dict[str, Any]], progress: Progress) -> None:
        """Runs one part. An exception is recorded with its traceback."""
        progress(name)
        begin = time.perf_counter()
        try:
            result = part()
        except Exception as error:  # an unknown chip may fail in any way
            self.files[f"{name}-traceback.txt"] = traceback.format_exc().encode()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.parts[name] = result | {"seconds": time.perf_counter() - begin}

    def add(self, name: str, content: str) -> None:
        """Adds a file to the archive."""
        self.files[name] = content.encode()


def examine(
    settings: Examination, out: Path, progress: Progress = lambda part: None
) -> dict[str, Any]:
    """Writes the archive `out` and returns its summary; `ok` is true where every part's is. Calls
    `progress` with each part's name. Raises BackendUnavailableError before anything runs."""
    backend = registry.usable(settings.backend)
    findings = Findings()
    findings.run("conformance", lambda: _conformance(settings, findings), progress)
    findings.run("alignment", lambda: _alignment(settings, backend, findings), progress)
    findings.run("utilisation", lambda: _utilisation(settings, backend, findings), progress)
    summary = {
        "glm_core": __version__,
        "backend": settings.backend,
        "device": _device(backend),
        "verified": backend.verified,
        "machine": machine(),
        "parts": findings.parts,
        "ok": all(part["ok"] for part in findings.parts.values()),
    }
    findings.add("summary.json", json.dumps(summary, indent=1, default=str))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in findings.files.items():
            archive.writestr(name, content)
    out.write_bytes(buffer.getvalue())
    return summary


def _device(backend: Backend) -> dict[str, Any]:
    """Returns the device's name and memory, as far as torch's module for it knows them."""
    module = torch.get_device_module(backend.device_type)
    get_name = getattr(module, "get_device_name", None)
    return {
        "type": backend.device_type,
        "name": get_name() if get_name and backend.device_type != "cpu" else backend.device_type,
        "memory_peak_bytes": backend.memory_peak_bytes(),
    }


def _conformance(settings: Examination, findings: Findings) -> dict[str, Any]:
    report = run(settings.backend, op=settings.op, real=settings.op is None)
    findings.add("conformance.json", json.dumps(report.to_json()))
    findings.add("conformance.html", render.page(report))
    counts = {o: report.count(o) for o in ("pass", "fail", "unsupported", "xfail")}
    return {"ok": report.ok, **counts, "failed": [r.id for r in report.failed]}


def _alignment(settings: Examination, backend: Backend, findings: Findings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = align.run(
            settings.config,
            [settings.backend],
            out_dir=folder,
            controls=settings.controls,
            dtypes=settings.dtypes(backend),
        )
        align_report.write(result, Path(folder) / "alignment.html")
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                findings.files[path.name] = path.read_bytes()
    verdicts = [pair.to_json() for pair in result.pairs]
    return {"ok": result.verdict == "aligned", "verdict": result.verdict, "pairs": verdicts}


def _utilisation(settings: Examination, backend: Backend, findings: Findings) -> dict[str, Any]:
    """Measures ops on published shapes, and whole training steps, with their share of the device's
    peak."""
    rows = run(settings.backend, mode="perf", op=settings.op).results
    findings.add("ops.json", json.dumps([{"id": r.id, **r.measured} for r in rows], default=str))
    steps = {d: _step(settings, backend, d) for d in settings.dtypes(backend)}
    findings.add("steps.json", json.dumps(steps))
    return {"ok": all(r.outcome != "fail" for r in rows), "steps": steps}


def _step(settings: Examination, backend: Backend, dtype: str) -> dict[str, Any]:
    config = preset(settings.preset)
    run = bench_step.ours(config, dtype, settings.backend)
    timing = interleave({"step": run}, settings.rounds)["step"]
    reached = bench_step.matmul_flops(config) / timing.median_s / 1e12
    row: dict[str, Any] = {
        "step_ms": timing.median_s * 1e3,
        "spread": timing.spread,
        "tflops": reached,
        "tokens_s": bench_step.BATCH * bench_step.LENGTH / timing.median_s,
    }
    if peak := backend.peak(getattr(torch, dtype)):
        row |= {"peak_share": reached / peak.tflops, "peak_source": peak.source}
    return row
