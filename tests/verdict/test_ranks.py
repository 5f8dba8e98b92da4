"""One verdict on a job: what its ranks found, the worst first."""

import dataclasses

import pytest

from glm_core.distributed import transfers
from glm_core.errors import ConfigError
from glm_core.verdict import render
from glm_core.verdict.comparison import Comparison
from glm_core.verdict.outcome import of_this_rank
from glm_core.verdict.ranks import merged, merged_comparisons, merged_curves
from glm_core.verdict.report import Finding, Report, Row, Unjudged, from_json
from glm_core.verdict.script import Request


def finding(operator: str, ratio: float, calls: int) -> Finding:
    return Finding(
        operator=operator,
        result="y",
        module="layers.0",
        line="train.py:7",
        phase="forward",
        step=2,
        dtype="float32",
        shape=[4, 8],
        test="scale",
        effect=1e-3,
        limit=1e-6,
        ratio=ratio,
        calls=calls,
    )


def report(rank: int, *findings: Finding) -> Report:
    ratios = {f.operator: f for f in findings}
    rows = [
        Row(
            operator=name,
            calls=3,
            guilty=ratios[name].calls if name in ratios else 0,
            ratio=ratios[name].ratio if name in ratios else 0.1 * (1 + rank),
            flops_share=share,
        )
        for name, share in (("aten::mm", 0.7), ("aten::gelu", 0.2))
    ]
    left = Unjudged(operator="lib::op", calls=2, flops_share=0.1, reason="no reference")
    return Report(
        program=f"train.py, rank {rank} of 3",
        devices=["cpu"],
        steps=[2],
        findings=list(findings),
        operators=rows,
        not_judged=[left],
        num_tests=100,
        false_alarm_rate=1e-3 / 3,
        seconds=1.0 + rank,
        peak_memory_bytes=1 << 20,
    )


def test_the_ranks_reports_are_one_the_worst_operator_first() -> None:
    reports = {
        0: report(0, finding("aten::mm", 2.0, 1)),
        1: report(1, finding("aten::gelu", 9.0, 2), finding("aten::mm", 3.0, 3)),
        2: report(2),
    }
    whole = merged(reports, 3)
    assert not whole.ok
    assert whole.program == "train.py, 3 ranks"
    assert [(f.operator, f.ranks, f.calls) for f in whole.findings] == [
        ("aten::gelu", [1], 2),
        ("aten::mm", [1, 0], 4),
    ]
    assert [(r.operator, r.rank, r.calls, r.guilty) for r in whole.operators] == [
        ("aten::gelu", 1, 9, 2),
        ("aten::mm", 1, 9, 4),
    ]
    assert [(u.calls, round(u.flops_share, 9)) for u in whole.not_judged] == [(6, 0.1)]
    assert (whole.num_tests, round(whole.false_alarm_rate, 9), whole.seconds) == (300, 1e-3, 3.0)
    assert "step 2, rank 1 (also 0): y" in str(whole.findings[1])
    assert whole.ranks == [r.sentence() for r in reports.values()]
    text = render.text(whole)
    assert text.count("alone: ") == 3
    assert next(x for x in text.splitlines() if x.startswith("operator")).endswith("rank")
    assert from_json(whole.to_json()) == whole


def test_a_rank_that_gave_no_report_is_named() -> None:
    whole = merged({0: report(0), 2: dataclasses.replace(report(2), notes=["short"])}, 3)
    assert whole.program == "train.py, 2 of 3 ranks"
    assert whole.notes == ["short", "no report came from rank 1: it is not judged here"]
    assert "rank 1" in render.text(whole)


def compared(rank: int, **findings: list[Finding]) -> Comparison:
    return Comparison(
        record=f"of-{rank}.safetensors",
        program=f"train.py, rank {rank} of 2",
        devices=["cpu"],
        torch="2.13.0",
        steps=[2],
        here="cpu",
        calls=10,
        equal=8,
        only_there=["aten::mm"] if rank else [],
        findings={"here": [], "there": []} | findings,
        not_compared=[Unjudged(operator="lib::op", calls=1, flops_share=0.0, reason="no")],
        num_tests=50,
    )


def test_the_ranks_comparisons_are_one() -> None:
    own = {0: compared(0), 1: compared(1, there=[finding("aten::gelu", 9.0, 2)])}
    whole = merged_comparisons(own, 2)
    assert (whole.program, whole.calls, whole.equal, whole.num_tests) == (
        "train.py, 2 ranks",
        20,
        16,
        100,
    )
    assert whole.only_there == ["aten::mm"]
    assert [(f.operator, f.ranks) for f in whole.findings["there"]] == [("aten::gelu", [1])]
    assert [(u.operator, u.calls) for u in whole.not_compared] == [("lib::op", 2)]


def test_the_jobs_loss_is_the_mean_of_the_ranks_that_have_one() -> None:
    first = {"loss": [None, None], "weights": [1.0], "gradients": [2.0]}  # an earlier stage
    last = {"loss": [3.0, 1.0], "weights": [4.0], "gradients": []}
    assert merged_curves([first, last]) == {
        "loss": [3.0, 1.0],
        "weights": [1.0, 4.0],
        "gradients": [2.0],
    }
    assert merged_curves([last, last | {"loss": [5.0, None]}])["loss"] == [4.0, None]
    assert merged_curves([first, first])["loss"] == [None, None]


def test_a_group_s_methods_are_its_own_again_after_the_count() -> None:
    before = [vars(transfers.ProcessGroup)[kind] for kind in ("send", "recv", "recv_anysource")]
    with transfers.counted():
        assert vars(transfers.ProcessGroup)["send"] is not before[0]
    assert [
        vars(transfers.ProcessGroup)[kind] for kind in ("send", "recv", "recv_anysource")
    ] == before


def test_each_rank_has_a_record_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(**names: str) -> Request:
        fields = {"script": "train.py", "args": [], "steps": [2], "false_alarm_rate": 1e-3}
        return of_this_rank(Request(**fields | names))  # type: ignore[arg-type]

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert asked(record="of.st", against="all.st").record == "of.st"
    with pytest.raises(ConfigError, match="RANK is not set"):
        asked(against="of-{rank}.st")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    own = asked(record="of-{rank}.st", against="all.st")
    assert (own.record, own.against) == ("of-1.st", "all.st")
    with pytest.raises(ConfigError, match="every rank of this job would write it"):
        asked(record="of.st")
    with pytest.raises(ConfigError, match="without a launcher"):
        asked(script="", against="of-{rank}.st")
