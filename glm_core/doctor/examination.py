"""Examines one backend in parts, the most valuable first. Each part's evidence is written as soon
as it is there, so that an examination that is cut short leaves what it found."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from glm_core import __version__, align
from glm_core.align import report as align_report
from glm_core.align import witness as step_witness
from glm_core.align.calibration import open_data
from glm_core.align.controls import check_controls
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.bench import goals
from glm_core.bench import step as bench_step
from glm_core.config import Dtype, RunConfig
from glm_core.conformance import render, witness
from glm_core.conformance.case import select
from glm_core.conformance.report import Report
from glm_core.conformance.run import run, run_case
from glm_core.conformance.witness import Witness
from glm_core.doctor import decoding
from glm_core.doctor.build import Build, refuse_folder_in_use
from glm_core.measure.timing import interleave, machine
from glm_core.model.presets import preset
from glm_core.spec import Support

Progress = Callable[[str], None]
EXPECTED_S = {
    "conformance": 21,
    "step": 44,
    "decoding": 20,
    "utilisation": 86,
    "goals": 60,
    "alignment": 131,
    "peers": 240,
    "published": 10,
}
"""seconds that each part is expected to take, in the order in which the parts run. Alignment took
as long with an H100 and 16 cores, the others on backend `cpu` with two busy cores. For
decoding, goals and peers, which build GLM-4-9B on the device, it is a guess. The last part takes
what time is left, and needs so much to be worth it"""
ORDER = ("build", *EXPECTED_S)
SAVE_EVERY = 200
"""the witness is saved after so many conformance cases, in case the device does not survive them"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """The settings of an examination."""

    backend: str
    config: RunConfig
    """the run whose loss curves are compared"""
    minutes: float = 10.0
    """a part that would probably end later is skipped"""
    controls: int = 5
    op: str | None = None
    """name of the only op in the conformance cases and measured ops; None: all"""
    preset: str = "glm4-34m"
    """the model whose training step is timed"""
    rounds: int = 10
    build: Build | None = None
    """the build that took its time out of `minutes`"""

    def dtypes(self, backend: Backend) -> list[Dtype]:
        """Returns float32 and the backend's half precision, bfloat16 if it has both."""
        halves: Sequence[Dtype] = ("bfloat16", "float16")
        half = [d for d in halves if getattr(torch, d) in backend.dtypes]
        return ["float32", *half[:1]]


class Evidence:
    """The folder of an examination: the findings of its parts and their files."""

    def __init__(self, folder: Path, backend: Backend, end: float) -> None:
        """Makes the folder. end: when the time is spent, by time.perf_counter. Raises GlmCoreError
        where the folder holds something."""
        refuse_folder_in_use(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.backend, self.end = folder, backend, end
        self.parts: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.witness: Witness = witness.new(backend)
        self._writing = threading.Lock()

    def run(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        """Runs one part and writes the summary. An exception is recorded with its traceback."""
        begin = time.perf_counter()
        try:
            result = part()
        except Exception as error:  # an unknown chip may fail in any way
            self.add(f"{name}-traceback.txt", traceback.format_exc())
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        with self._writing:
            self.parts[name] = result | {"seconds": time.perf_counter() - begin}
            self.write_summary(finished=False)

    def add(self, name: str, content: str) -> None:
        """Writes a file."""
        (self.folder / name).write_text(content, encoding="utf-8")

    def add_conformance(self, name: str, report: Report) -> dict[str, Any]:
        """Writes a conformance report and the witness. Returns the findings."""
        self.add(f"{name}.json", json.dumps(report.to_json()))
        self.add(f"{name}.html", render.page(report))
        self.witness.keep_unsupported(report)
        self.save_witness()
        counts = {o: report.count(o) for o in ("pass", "fail", "unsupported", "xfail")}
        return {"ok": report.ok, **counts, "failed": [r.id for r in report.failed]}

    def save_witness(self) -> None:
        """Writes the witness as it is so far."""
        self.witness.save(self.folder / "witness.safetensors")

    def write_summary(self, finished: bool) -> dict[str, Any]:
        """Writes and returns the summary; `ok` is true where every part that was run is good."""
        summary = {
            "glm_core": __version__,
            "backend": self.backend.name,
            "device": {
                "type": self.backend.device_type,
                "name": witness.device_name(self.backend),
                "memory_peak_bytes": self.backend.memory_peak_bytes(),
            },
            "verified": self.backend.verified,
            "machine": machine(),
            "parts": {name: self.parts[name] for name in ORDER if name in self.parts},
            "skipped": self.skipped,
            "finished": finished,
            "ok": bool(self.parts) and all(part["ok"] for part in self.parts.values()),
        }
        self.add("summary.json", json.dumps(summary, indent=1, default=str))
        return summary


def examine(
    settings: Examination, out: Path, progress: Progress = lambda part: None
) -> dict[str, Any]:
    """Fills the folder `out` part by part, packs it into `out`.zip and returns the summary. A part
    that would probably not end in time is skipped and named. Calls `progress` with each part's
    name. Raises BackendUnavailableError, or GlmCoreError for a folder in use, before anything
    runs."""
    backend = registry.usable(settings.backend)
    check_controls(settings.controls or 1)
    taken = settings.build.seconds if settings.build else 0.0
    evidence = Evidence(out, backend, time.perf_counter() + 60 * settings.minutes - taken)
    if settings.build:
        evidence.add("build.log", settings.build.log)
        command = settings.build.command
        evidence.parts["build"] = {"ok": True, "seconds": taken, "command": command}
    early = "alignment" if _fits_beside(evidence) else ""
    with ThreadPoolExecutor(1) as pool:

        def examine_part(name: str) -> None:
            progress(name)
            evidence.run(name, functools.partial(PARTS[name], settings, evidence))

        running = pool.submit(examine_part, early) if early else None
        for name, needed in EXPECTED_S.items():
            if name == "utilisation" and running:
                running.result()
            left = evidence.end - time.perf_counter()
            if name == early:
                continue
            if needed > left:
                evidence.skipped[name] = f"takes about {needed} s, {max(left, 0):.0f} s were left"
                continue
            examine_part(name)
    summary = evidence.write_summary(finished=True)
    shutil.make_archive(str(out), "zip", out)
    return summary


def _fits_beside(evidence: Evidence) -> bool:
    """Returns whether the loss curves run beside the parts that are timed by nothing: on a device
    of its own, where the host would wait most of the time, and if the timed parts still fit
    after them."""
    left = evidence.end - time.perf_counter()
    needed = sum(EXPECTED_S[name] for name in ("alignment", "utilisation", "goals"))
    return evidence.backend.device_type != "cpu" and needed <= left


def _conformance(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Runs the cases without the shapes of published models; saves the witness now and then."""

    def save(number: int, total: int, id: str) -> None:
        if number % SAVE_EVERY == SAVE_EVERY - 1:
            evidence.save_witness()

    keep = evidence.witness.keep
    report = run(evidence.backend, op=settings.op, real=False, keep=keep, progress=save)
    return evidence.add_conformance("conformance", report)


def _step_calls(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Records a training step's op calls into the witness, and judges them."""
    kept, backend = evidence.witness, evidence.backend
    sampler = open_data(settings.config, ".cache")()
    dtype = settings.dtypes(backend)[-1]
    too_large = step_witness.record_step(kept, settings.config, dtype, sampler, backend)
    evidence.save_witness()
    findings = step_witness.judge(kept)
    guilty = [str(f) for f in findings if f.ratio > 1]
    facts = {"calls": len(kept.calls), "too_large": too_large, "guilty": guilty}
    return {"ok": not guilty, "max_op_ratio": max(f.ratio for f in findings), **facts}


def _decoding(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Compares whole decode steps with their ops and with float64."""
    dtype = getattr(torch, settings.dtypes(evidence.backend)[-1])
    found = decoding.check(evidence.backend, dtype)
    evidence.add("decoding.json", json.dumps(found, indent=1))
    return {"ok": all(f["ok"] for f in found.values()), "precisions": found}


def _published(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Runs the cases with the shapes of published models until the time is spent."""
    backend, keep = evidence.backend, evidence.witness.keep
    cases = [case for case in select(backend, op=settings.op) if case.sample.real]
    results = []
    for case in cases:
        if time.perf_counter() > evidence.end:
            break
        results.append(run_case(case, backend, keep=keep))
    report = Report(backend.name, results, machine())
    not_run = [case.id for case in cases[len(results) :]]
    return evidence.add_conformance("published", report) | {"not_run": not_run}


def _alignment(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = align.run(
            settings.config,
            [settings.backend],
            out_dir=folder,
            controls=settings.controls,
            dtypes=settings.dtypes(evidence.backend),
        )
        align_report.write(result, Path(folder) / "alignment.html")
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                shutil.copy(path, evidence.folder)
    verdicts = [pair.to_json() for pair in result.pairs]
    return {"ok": result.verdict == "aligned", "verdict": result.verdict, "pairs": verdicts}


def _utilisation(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Measures ops on published shapes, and whole training steps, with their share of the device's
    peak."""
    rows = run(settings.backend, mode="perf", op=settings.op).results
    evidence.add("ops.json", json.dumps([{"id": r.id, **r.measured} for r in rows], default=str))
    steps = {d: _step(settings, evidence.backend, d) for d in settings.dtypes(evidence.backend)}
    evidence.add("steps.json", json.dumps(steps))
    return {"ok": all(r.outcome != "fail" for r in rows), "steps": steps}


def _goals(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Measures decoding and prefill against what is asked of them. A goal that is missed is named,
    and is no fault."""
    backend = evidence.backend
    result = goals.measure(backend, goals.config_for(backend), settings.rounds)
    evidence.add("goals.json", json.dumps(result, indent=1))
    return {"ok": True, **{k: result[k] for k in ("missed", "layers", "fallbacks")}}


def _peers(settings: Examination, evidence: Evidence) -> dict[str, Any]:
    """Measures decoding and training beside transformers, as `_goals` does."""
    backend = evidence.backend
    if backend.device_type == "cpu":
        return {"ok": True, "see": "python -m glm_core.bench.decode, python -m glm_core.bench.step"}
    result = goals.measure_beside(backend, goals.config_for(backend), settings.rounds)
    evidence.add("peers.json", json.dumps(result, indent=1))
    return {"ok": True, **{k: result[k] for k in ("missed", "unmeasured", "layers", "fallbacks")}}


def _step(settings: Examination, backend: Backend, dtype: str) -> dict[str, Any]:
    config = preset(settings.preset)
    runs = {"step": bench_step.ours(config, dtype, settings.backend)}
    if not isinstance(backend.graphs(backend.device()), Support):
        runs["graph"] = bench_step.ours(config, dtype, settings.backend, graph=True)
    timings = interleave(runs, settings.rounds)
    timing = timings["step"]
    reached = bench_step.matmul_flops(config) / timing.median_s / 1e12
    row: dict[str, Any] = {
        "spread": timing.spread,
        **{f"{name}_ms": t.median_s * 1e3 for name, t in timings.items()},
        "tflops": reached,
        "tokens_s": bench_step.BATCH * bench_step.LENGTH / timing.median_s,
    }
    if peak := backend.peak(getattr(torch, dtype)):
        row |= {"peak_share": reached / peak.tflops, "peak_source": peak.source}
    return row


PARTS: dict[str, Callable[[Examination, Evidence], dict[str, Any]]] = {
    "conformance": _conformance,
    "step": _step_calls,
    "decoding": _decoding,
    "utilisation": _utilisation,
    "goals": _goals,
    "alignment": _alignment,
    "peers": _peers,
    "published": _published,
}
