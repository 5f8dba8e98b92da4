"""Measures how often an honest candidate is called diverged: many small models, seeds and kernels,
each judged as any candidate is, and the interval in which the true rate lies."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from math import comb
from pathlib import Path
from typing import Any

import torch

from glm_core import align
from glm_core.align.verdict import finite
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.faults.catalogue import BENIGN
from glm_core.faults.fault import Benign
from glm_core.sensitivity.detection import Row, judge
from glm_core.sensitivity.setups import DTYPES, SETUPS, Drawn, draw, setup_of

Progress = Callable[[int, int, Row], None]
SHAPES = ((2, 32, 64, 24), (2, 48, 96, 33), (3, 64, 128, 17))
"""layers, width, feed-forward and tokens a sequence of the small models, taken in turn"""
MODELS = ("130b", "glm4", "glm")
"""the setups that the small models are cut from; none of them has experts"""
STEPS, CONTROLS, SEQUENCES = 10, 4, 4
PER_MODEL = 14
"""honest changes judged on each model, backends and ways to run included"""
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Honest:
    """The outcomes of all comparisons."""

    rows: list[Row]
    seconds: float

    @property
    def judged(self) -> list[Row]:
        """Returns the comparisons that could run here."""
        return [r for r in self.rows if not r.skipped]

    def to_json(self) -> dict[str, Any]:
        """Returns the counts, the interval of the true rate, and every row."""
        judged = self.judged
        alarms = [r for r in judged if r.convicted]
        groups = sorted(Counter(group(r) for r in judged).items())
        tests = ("envelope_ratio", "gradient_ratio", "op_ratio")
        low, high = interval(len(alarms), len(judged))
        return {
            "judged": len(judged),
            "alarms": len(alarms),
            "rate_low": low,
            "rate_high": high,
            "convicted": [f"{r.setup}: {r.name}" for r in alarms],
            "by_kind": dict(groups),
            "largest": {t: finite(max((getattr(r, t) for r in judged), default=0)) for t in tests},
            "seconds": self.seconds,
            "rows": [{k: finite(v) for k, v in dataclasses.asdict(r).items()} for r in self.rows],
        }

    def text(self) -> str:
        """Returns the convicted, then the totals."""
        j = self.to_json()
        lines = [f"convicted: {r.setup}: {r.name}: {r.finding}" for r in self.judged if r.convicted]
        kinds = ", ".join(f"{n} {kind}" for kind, n in j["by_kind"].items())
        largest = ", ".join(f"{t.partition('_')[0]} {x:.2f}" for t, x in j["largest"].items())
        lines.append(f"{j['alarms']} of {j['judged']} honest comparisons diverged ({kinds})")
        low, high = j["rate_low"], j["rate_high"]
        lines.append(f"the true rate lies between {low:.2%} and {high:.2%} ({CONFIDENCE:.0%})")
        return "\n".join([*lines, f"largest ratios: {largest}; {j['seconds']:.0f} s"])


def group(row: Row) -> str:
    """Returns what a comparison is counted under: a backend, a way to run, or a kernel."""
    change = next(b for b in BENIGN if b.name == row.name)
    if change.registered:
        return f"backend {change.registered}"
    return "another way to run" if change.micro_batch or change.threads > 1 else "kernel"


def interval(alarms: int, judged: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the two-sided interval of Clopper and Pearson (1934): the rates at which so many
    alarms, or more, or fewer, are not yet improbable."""
    tail = (1 - confidence) / 2

    def at_most(rate: float, count: int) -> float:
        each = (comb(judged, i) * rate**i * (1 - rate) ** (judged - i) for i in range(count + 1))
        return sum(each)

    low = _root(lambda rate: 1 - at_most(rate, alarms - 1) - tail) if alarms else 0.0
    high = _root(lambda rate: tail - at_most(rate, alarms)) if alarms < judged else 1.0
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return high


def false_alarms(
    count: int = 300,
    *,
    first_seed: int = 0,
    cache_dir: str | Path = ".cache",
    kept: str | Path = "",
    progress: Progress | None = None,
) -> Honest:
    """Judges at least `count` honest comparisons on one thread, model after model. Every row is
    appended to the file `kept` as it is made; the rows that are there are not judged again."""
    begin, rows = time.perf_counter(), stored(kept)
    judged = sum(not r.skipped for r in rows)
    torch.set_num_threads(1)
    for seed in range(first_seed, first_seed + 10 * count):
        if judged >= count:
            break
        done = {r.name for r in rows if r.setup.split()[0] == str(seed)}
        for row in of_model(seed, cache_dir, done):
            rows.append(row)
            if kept:
                with Path(kept).open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(dataclasses.asdict(row)))
            judged += not row.skipped
            if progress is not None:
                progress(min(judged, count), count, row)
    return Honest(rows=rows, seconds=time.perf_counter() - begin)


def stored(kept: str | Path) -> list[Row]:
    """Returns the rows in the file; none where there is no file. A row that was cut off when its
    run was stopped is left out."""
    if not kept or not Path(kept).exists():
        return []
    lines = Path(kept).read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines if line.endswith("}")]


def of_model(
    seed: int, cache_dir: str | Path, done: Collection[str] = frozenset()
) -> Iterator[Row]:
    """Calibrates model number `seed` and yields a row per honest change that is not `done`."""
    run = model_of(seed)
    left = [change for change in changes(seed, run.train.dtype) if change.name not in done]
    if not left:
        return
    drawn = draw(run, cache_dir)
    half = (STEPS // 2, STEPS)
    cal = align.calibrate(run, sampler=lambda: Drawn(drawn), controls=CONTROLS, capture_steps=half)
    for change in left:
        yield dataclasses.replace(judge(change, run, cal), setup=f"{seed} {run.train.dtype}")


def model_of(seed: int) -> RunConfig:
    """Returns the run of model number `seed`: setups, shapes and dtypes in turn."""
    names = MODELS
    model, _ = SETUPS[names[seed % len(names)]]
    layers, hidden, ffn, length = SHAPES[seed // len(names) % len(SHAPES)]
    sizes: dict[str, Any] = {"num_layers": layers, "hidden": hidden, "ffn": ffn}
    sizes["init_std"] = hidden**-0.5
    small: ModelConfig = dataclasses.replace(model, **sizes)
    return RunConfig(
        model=small,
        data=DataConfig(vocab=small.vocab, length=length, gmask_prob=0.5),
        train=TrainConfig(
            backend="reference",
            dtype=DTYPES[seed % len(DTYPES)],  # type: ignore[arg-type]  # one of the two
            steps=STEPS,
            micro_batch=SEQUENCES,
            global_batch=SEQUENCES,
            warmup_steps=3,
            clip=0.5,
            seed=seed,
        ),
    )


def changes(seed: int, dtype: str) -> list[Benign]:
    """Returns the honest changes that model number `seed` is judged with: every backend and way to
    run, and kernels drawn at random."""
    setup = MODELS[seed % len(MODELS)]
    known = [b for b in BENIGN if dtype in b.dtypes and not b.neutral]
    backends = [b for b in known if b.registered and setup_of(b) == setup]
    whole = backends + [b for b in known if b.threads > 1 or 0 < b.micro_batch < SEQUENCES]
    kernels = [b for b in known if b not in whole and not b.registered and setup_of(b) == setup]
    few = max(PER_MODEL - len(whole), 0)
    return whole + random.Random(seed).sample(kernels, min(few, len(kernels)))
