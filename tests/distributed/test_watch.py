"""A rank that hangs, is stopped or is killed is named with op and stack; the next start loses only
the steps since the last save. Every job has its own timeout, past which the test kills it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import process
import pytest
from ranks import Job, Ranks

from glm_core.distributed import straggler, watch

WORKERS = "elastic_workers"
TIMEOUT_S, INTERVAL_S = 3.0, 0.4
WEIGHT = "[84.0, 84.0, 84.0, 84.0]"
"""of 6 steps: 2 ranks x 2 x (1 + ... + 6), the norm of four equal numbers being twice one"""


def train(ranks: Ranks, tmp_path: Path, fault: str) -> Job:
    timeout_s = TIMEOUT_S if fault else 100.0  # a fault's is waited for
    return ranks.run(
        f"{WORKERS}.training",
        2,
        str(tmp_path / "run"),
        6,
        fault,
        timeout_s,
        INTERVAL_S,
        folder=tmp_path,
    )


@pytest.mark.parametrize("fault", ["hang", "hold", "stop", "kill"])
def test_a_fault_is_named_and_the_next_start_goes_on(
    ranks: Ranks, tmp_path: Path, fault: str
) -> None:
    job = train(ranks, tmp_path, fault)
    # a stopped process can do nothing; the launcher's SIGKILL is the test's here
    assert job.codes == [1, {"hang": 1, "hold": 1, "stop": None, "kill": -9}[fault]], job.told
    said = job.outputs[0]
    if fault == "hang":
        assert "rank 1 of 2 holds up the job: step 3, inside op global_norm" in said, job.told
        assert "elastic_workers.py" in said
        assert "rank 0 waits" in said
        assert f"no progress for {TIMEOUT_S:g} s, inside op global_norm" in job.outputs[1]
    else:
        assert "rank 1 (pid " in said, job.told
        fact = "is gone or does not answer; last seen in step 3, inside op global_norm\n  rank 1: "
        assert fact in said, job.told
    if fault == "hold":  # no Python thread could run there: faulthandler's own words
        assert "in hold" in said, job.told
    again = train(ranks, tmp_path, "")
    assert again.codes == [0, 0], again.told
    for output in again.outputs:
        assert output.splitlines()[-2:] == ["starts after step 2", WEIGHT]


def test_a_straggler_is_named_with_its_op(ranks: Ranks, tmp_path: Path) -> None:
    job = ranks.run(f"{WORKERS}.slow_step", 2, str(tmp_path / "w"), folder=tmp_path)
    assert job.codes == [0, 0], job.told
    values, text = job.outputs[0].splitlines()
    found: dict[str, Any] = json.loads(values)
    assert (found["step"], found["slowest"], found["op"]) == (2, 1, "global_norm")
    assert found["op_s"] > 0.9 > found["op_median_s"]
    assert found["waiting_s"]["0"] > 0.5  # rank 0 waited, and that is not its own time
    assert text.startswith("step 2: straggler: rank 1 takes ")


def times(own: float, **ops: float) -> dict[str, Any]:
    return {"step": 4, "step_s": own + 1.0, "waiting_s": 1.0, "ops": ops}


def test_report_over_ranks() -> None:
    found = {0: times(1.0, linear=0.6), 1: times(1.5, linear=0.6), 3: times(1.0, linear=0.7)}
    r = straggler.compare(4, found, 4)
    assert (r.slowest, r.ratio, r.op, r.missing) == (1, 1.5, "outside ops", [2])
    assert r.op_s == pytest.approx(0.9)
    assert r.op_median_s == pytest.approx(0.35)
    assert "no times of rank 2" in r.text()
    even = straggler.compare(4, {0: times(1.0, linear=0.6), 1: times(1.05, linear=0.6)}, 2)
    assert even.text() == "step 4: no straggler, own times vary by 2.4%"


def test_a_log_goes_on_where_the_run_does(tmp_path: Path) -> None:
    log = straggler.StragglerLog(tmp_path / "stragglers.json", 0)
    assert log.text() == ""
    slow = {0: times(1.0, linear=0.6), 1: times(1.5, linear=1.1)}
    even = {0: times(1.0, linear=0.6), 1: times(1.05, linear=0.6)}
    for step, found in ((4, slow), (8, even), (12, slow)):
        log.add(straggler.compare(step, found, 2))
    summary = (
        "stragglers: rank 1 in 2 of 3 timed steps, at worst in step 4: 1.50 times the others' "
    )
    assert log.text().startswith(summary + "median, most of it in linear; own times vary by 20.0%")
    resumed = straggler.StragglerLog(tmp_path / "stragglers.json", 9)
    assert resumed.reports == log.reports[:2]
    resumed.add(straggler.compare(12, even, 2))
    assert json.loads(resumed.path.read_text())["summary"] == resumed.text()
    assert "rank 1 in 1 of 3" in resumed.text()


def record(rank: int, **changes: Any) -> dict[str, Any]:
    values = {
        "rank": rank,
        "pid": 1,
        "host": "a",
        "state": "hung",
        "time": 0.0,
        "begun": "step 3",
        "collectives": {"0": 7},
        "what": "all_reduce",
        "waiting": True,
        "stack": ["f.py:1 g"],
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("records", "verdict"),
    [
        (
            [record(0), record(1, what="op rope", waiting=False), record(2)],
            "rank 1 of 3 holds up the job: step 3, inside op rope\n  rank 1: f.py:1 g; "
            "rank 0, 2 waits",
        ),
        (
            [record(0), record(1), record(2, collectives={"0": 6}, what="all_gather")],
            "rank 2 of 3 holds up the job: step 3, inside all_gather\n  rank 2: f.py:1 g; "
            "rank 0, 1 waits",
        ),
        (
            [record(0), record(1), record(2)],
            "all 3 ranks wait for each other: rank 0 in all_reduce; rank 1 in all_reduce; rank 2 "
            "in all_reduce",
        ),
        (
            [record(0), record(1), record(2, time=-1e9)],
            "rank 2 (pid 1 on a) is gone or does not answer; last seen in step 3, inside "
            "all_reduce\n  rank 2: f.py:1 g",
        ),
        ([record(0), record(1)], "rank 2 never began"),
    ],
    ids=["busy", "behind", "deadlock", "silent", "absent"],
)
def test_verdict(
    records: list[dict[str, Any]], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for r in records:
        one = watch.Record(tmp_path, r["rank"])
        one.write(r)
        one.close()
    seen = watch.RankWatch(tmp_path / "mine", 0, 3)
    seen.folder = tmp_path
    monkeypatch.setattr(watch.time, "time", lambda: 0.0)
    assert seen.verdict() == verdict
    seen.record.close()


def test_a_record_keeps_its_size_and_its_innermost_frames(tmp_path: Path) -> None:
    one = watch.Record(tmp_path, 0)
    one.write(record(0, stack=[f"{n} " + "x" * 200 for n in range(200)]))
    one.close()
    assert one.path.stat().st_size == watch.RECORD_BYTES
    kept = watch.read(one.path)
    assert kept is not None
    assert kept["stack"][-1].startswith("199 ")
    assert 60 < len(kept["stack"]) < 200


def test_an_idle_thread_is_where_it_waits() -> None:
    event, ready = threading.Event(), threading.Event()

    def work() -> None:
        ready.set()
        event.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    place = watch.place_of(sys._current_frames().get(thread.ident or 0))
    event.set()
    thread.join()
    assert "test_watch.py" in " ".join(place.stack)
    assert watch.place_of(None).what == "nothing: its thread has ended"


def test_the_launcher_names_rank_signal_op_and_stack(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import elastic_workers as w; w.training({str(tmp_path / 'run')!r}, 6, 'kill', 60, 0.2)\n"
    )
    done = process.run(
        [sys.executable, "-m", "glm_core.cli", "launch", "--nproc-per-node", "2", str(script)],
        PYTHONPATH=str(process.ROOT),
    )
    assert done.returncode == 1
    last = done.stderr[done.stderr.rindex("glm-core: rank 1 (pid ") :]
    assert "ended first, by SIGKILL; last seen in step 3, inside op global_norm\n" in last
    assert "elastic_workers.py" in last
