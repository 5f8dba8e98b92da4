"""Large calls, short memory, worker processes and CUDA graphs under the watch."""

from __future__ import annotations

import multiprocessing
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from glm_core import verdict
from glm_core.faults.aten import Planted, aten_fault
from glm_core.measure import memory
from glm_core.verdict import graphs, lists, room, slices
from glm_core.verdict.judge import judge
from glm_core.verdict.oracle import Call
from glm_core.verdict.report import Report


def judged(function: object, *args: object) -> Report:
    with verdict.watch(steps=(1,)) as watch:
        function(*args)  # type: ignore[operator]
    return watch.report()


def step(**adam: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adam)  # type: ignore[arg-type]
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_some_tensors_of_a_large_optimizer_are_judged(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "LARGE", 100)
    sizes: list[int] = []
    plain = lists.some

    def some(*args: object) -> object:
        call, actual = plain(*args)  # type: ignore[arg-type]
        sizes.append(max(y.numel() for y in actual.values()))
        return call, actual

    monkeypatch.setattr(lists, "some", some)
    report = judged(lambda: step(**{kind: True}))
    assert report.ok, report.sentence()
    assert sizes
    assert 50 < max(sizes) <= 108
    fault = {
        "fused": "_fused_adamw_: beta2 is 0.99",
        "foreach": "_foreach_addcdiv_: not applied to the last tensor",
    }[kind]
    with Planted(aten_fault(fault)):
        found = [f.operator for f in judged(lambda: step(**{kind: True})).findings]
    assert found == [aten_fault(fault).operator]


def test_where_memory_is_short_smaller_parts_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(slices, "LARGE", 1 << 12)
    x, w = torch.randn(300, 40), torch.randn(40, 50)
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 8 * room.COPIES * 6000)
    report = judged(torch.mm, x, w)
    assert [(r.operator, r.calls) for r in report.operators] == [("aten::mm", 1)]
    assert "smaller parts than usual" in report.notes[0]
    with Planted(aten_fault("mm: the last term of each sum is left out")):
        assert judged(torch.mm, x, w).findings
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 100)
    [left] = judged(torch.mm, x, w).not_judged
    assert left.reason.startswith("too little memory on the host")


def test_an_allocator_that_gives_up_leads_to_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "LARGE", 64)
    plain = judge

    def short(call: Call, *args: object) -> object:
        if call.args[0].shape[0] > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9")
        return plain(call, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "judge", short)
    x = torch.randn(64, 16)
    assert "smaller parts" in judged(torch.exp, x).notes[0]
    assert not room.out_of_memory(RuntimeError("shapes differ"))


def test_a_copy_without_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(self: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    x = torch.ones(3)
    with verdict.watch(steps=(1,)) as watch:
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        x.mul_(2)
        monkeypatch.undo()
    [left] = watch.report().not_judged
    assert "no memory on its device" in left.reason
    assert x.tolist() == [2, 2, 2]


def work(queue: multiprocessing.Queue[float]) -> None:
    queue.put(float(torch.exp(torch.zeros(3)).sum()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, of other threads
def test_what_a_worker_process_computes_is_not_judged() -> None:
    context = multiprocessing.get_context("fork")
    with verdict.watch(steps=(1,)) as watch:
        queue = context.Queue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        assert queue.get(timeout=60) == 3.0
        process.join()
        torch.exp(torch.ones(2))
    assert [(r.operator, r.calls) for r in watch.report().operators] == [
        ("aten::ones", 1),
        ("aten::exp", 1),
    ]


def test_replays_of_a_graph_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDAGraph:
        def replay(self) -> str:
            return "replayed"

    module = types.ModuleType("torch.cuda.graphs")
    module.CUDAGraph = CUDAGraph  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.cuda.graphs", module)
    report = judged(lambda: (CUDAGraph().replay(), CUDAGraph().replay(), torch.exp(torch.ones(2))))
    assert [n for n in report.notes if n.startswith("a CUDA graph was replayed in step 1")]
    assert len(report.notes) == 1
    assert CUDAGraph().replay() == "replayed"


def test_operators_that_are_captured_into_a_graph_have_no_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acme = types.SimpleNamespace(is_current_stream_capturing=lambda: True)
    monkeypatch.setattr(torch, "acme", acme, raising=False)
    assert graphs.captured("acme")
    assert not graphs.captured("unknown")


def test_eager_is_torchs_stance_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "set_stance", nullcontext)  # the true one loads for seconds
    with verdict.eager() as stance:
        assert stance == "force_eager"
