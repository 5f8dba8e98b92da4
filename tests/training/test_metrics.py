"""The metrics file has every step once, whatever happened; TensorBoard's own reader agrees."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_core.errors import ConfigError
from glm_core.training.metrics import Metrics, Progress, kept_bytes

LINES = [json.dumps({"step": n, "loss": 5 - n / 7}).encode() + b"\n" for n in range(1, 10)]


@given(st.integers(0, len(b"".join(LINES))), st.integers(0, 10))
def test_whatever_a_kill_left_only_whole_lines_up_to_the_checkpoint_stay(
    cut: int, done: int
) -> None:
    left = b"".join(LINES)[:cut]
    kept = left[: kept_bytes(left, done)]
    whole = left.count(b"\n")
    assert kept == b"".join(LINES[: min(whole, done)])


def test_resumed_file_has_no_step_twice(tmp_path: Path) -> None:
    for done, steps in ((0, range(1, 6)), (3, range(4, 8))):
        metrics = Metrics(tmp_path, done)
        for step in steps:
            metrics.write({"step": step, "loss": 0.5})
        metrics.sync()
        metrics.close()
    path = tmp_path / "metrics.jsonl"
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == list(range(1, 8))


def test_a_line_is_readable_at_once_and_strict_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "skipped": True})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics.close()
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "skipped": true}'


def test_tensorboard_reads_what_was_written_and_a_resume_purges(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps, shift in ((0, range(1, 6), 0.0), (3, range(4, 7), 1.0)):
        metrics = Metrics(tmp_path, done, tensorboard=True)
        for step in steps:
            metrics.write({"step": step, "loss": step + shift, "grad_norm": math.inf})
        metrics.sync()
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    values = [(e.step, e.value) for e in events.Scalars("loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 5.0), (5, 6.0), (6, 7.0)]


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"TensorBoard events: .*; pip install tensorboard, or run"
    ):
        Metrics(tmp_path, 0, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_redrawn() -> None:
    stream = Terminal()
    progress = Progress(4, stream, width=8)
    for done in (1, 2, 3, 4):
        progress.update(done, "x")
    first, last = "\r\x1b[K[##......] 1/4  x", "\r\x1b[K[########] 4/4  x\n"
    assert stream.getvalue().startswith(first)
    assert stream.getvalue().endswith(last)
    assert stream.getvalue().count("\n") == 1


def test_progress_in_a_log_is_about_twenty_lines() -> None:
    stream = io.StringIO()
    progress = Progress(1003, stream)
    for done in range(1, 1004):
        progress.update(done, "loss")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "50/1003  loss"
    assert lines[-1] == "1003/1003  loss"
    assert len(lines) == 21
