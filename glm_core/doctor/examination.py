"""What a person with the chip runs once: conformance, alignment and utilisation of one backend, in
one file to send back. A part that goes wrong is a finding; the others go on."""

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
    """What is asked of a backend."""

    backend: str
    config: RunConfig
    """the run whose loss curves are compared"""
    controls: int = 8
    op: str | None = None
    """one op's cases only"""
    preset: str = "glm4-34m"
    """the model whose training step is timed"""
    rounds: int = 10

    def dtypes(self, backend: Backend) -> list[Dtype]:
        """float32 and the backend's half precision, bfloat16 if it has both."""
        known: Sequence[Dtype] = ("bfloat16", "float16")
        half = [d for d in known if getattr(torch, d) in backend.dtypes]
        return ["float32", *half[:1]]


class Findings:
    """The parts as they are found, each a file of the archive."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def part(self, name: str, find: Callable[[], dict[str, Any]], tell: Progress) -> None:
        """Runs one part; its exception is kept whole."""
        tell(name)
        begin = time.perf_counter()
        try:
            found = find()
        except Exception as error:  # a chip nobody has seen may fail in any way; the file says how
            self.files[f"{name}-traceback.txt"] = traceback.format_exc().encode()
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.parts[name] = found | {"seconds": time.perf_counter() - begin}

    def add(self, name: str, content: str) -> None:
        """One more file of the archive."""
        self.files[name] = content.encode()


def examine(asked: Examination, out: Path, tell: Progress = lambda part: None) -> dict[str, Any]:
    """Writes the archive `out`; returns its summary, `ok` where every part is. Raises
    BackendUnavailableError before anything runs."""
    backend = registry.usable(asked.backend)
    findings = Findings()
    findings.part("conformance", lambda: _conformance(asked, findings), tell)
    findings.part("alignment", lambda: _alignment(asked, backend, findings), tell)
    findings.part("utilisation", lambda: _utilisation(asked, backend, findings), tell)
    summary = {
        "glm_core": __version__,
        "backend": asked.backend,
        "device": _device(backend),
        "verified": backend.verified,
        "machine": machine(),
        "parts": findings.parts,
        "ok": all(part["ok"] for part in findings.parts.values()),
    }
    findings.add("summary.json", json.dumps(summary, indent=1, default=str))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in findings.files.items():
            archive.writestr(name, content)
    out.write_bytes(packed.getvalue())
    return summary


def _device(backend: Backend) -> dict[str, Any]:
    """Its name and memory, as far as torch's module for it tells."""
    module = torch.get_device_module(backend.device_type)
    named = getattr(module, "get_device_name", None)
    return {
        "type": backend.device_type,
        "name": named() if named and backend.device_type != "cpu" else backend.device_type,
        "memory_peak_bytes": backend.memory_peak_bytes(),
    }


def _conformance(asked: Examination, findings: Findings) -> dict[str, Any]:
    report = run(asked.backend, op=asked.op, real=asked.op is None)
    findings.add("conformance.json", json.dumps(report.to_json()))
    findings.add("conformance.html", render.page(report))
    counts = {o: report.count(o) for o in ("pass", "fail", "unsupported", "xfail")}
    return {"ok": report.ok, **counts, "failed": [r.id for r in report.failed]}


def _alignment(asked: Examination, backend: Backend, findings: Findings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = align.run(
            asked.config,
            [asked.backend],
            out_dir=folder,
            controls=asked.controls,
            dtypes=asked.dtypes(backend),
        )
        align_report.write(result, Path(folder) / "alignment.html")
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                findings.files[path.name] = path.read_bytes()
    verdicts = [pair.to_json() for pair in result.pairs]
    return {"ok": result.verdict == "aligned", "verdict": result.verdict, "pairs": verdicts}


def _utilisation(asked: Examination, backend: Backend, findings: Findings) -> dict[str, Any]:
    """Ops on published shapes, and whole training steps, with their share of the device's peak."""
    rows = run(asked.backend, mode="perf", op=asked.op).results
    findings.add("ops.json", json.dumps([{"id": r.id, **r.measured} for r in rows], default=str))
    steps = {d: _step(asked, backend, d) for d in asked.dtypes(backend)}
    findings.add("steps.json", json.dumps(steps))
    return {"ok": all(r.outcome != "fail" for r in rows), "steps": steps}


def _step(asked: Examination, backend: Backend, dtype: str) -> dict[str, Any]:
    config = preset(asked.preset)
    run = bench_step.ours(config, dtype, asked.backend)
    timing = interleave({"step": run}, asked.rounds)["step"]
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
