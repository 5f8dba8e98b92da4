"""A pytest plugin that runs DeepSpeed's own tests on a CPU, under DeepSpeed or under us.

A test's ranks are forked processes. Where one fails, or the time is over, the others are killed.
Each outcome is a line of JSON in the file THEIR_OUTCOMES."""

from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

LIMIT_S = float(os.environ.get("THEIR_LIMIT_S", "60"))
"""for all ranks of one test"""
GRACE_S = 3.0
"""for the other ranks, once one has failed"""
UNUSED = {
    "moe.layer": ["MoE"],
    "ops.op_builder": [
        "CPUAdamBuilder",
        "FusedAdamBuilder",
        "FusedLambBuilder",
        "AsyncIOBuilder",
        "QuantizerBuilder",
    ],
    "ops.aio": ["AsyncIOBuilder"],
    "runtime.fp16.unfused_optimizer": ["FP16_UnfusedOptimizer"],
    "runtime.fp16.fused_optimizer": ["FP16_Optimizer"],
    "runtime.bf16_optimizer": ["BF16_Optimizer"],
    "runtime.zero.stage3": ["DeepSpeedZeroOptimizer_Stage3"],
    "runtime.zero.stage_1_and_2": ["DeepSpeedZeroOptimizer"],
    "runtime.fp16.onebit.lamb": ["OnebitLamb"],
    "runtime.base_optimizer": ["ZeROOptimizer"],
}
"""classes that the helpers import and most tests do not use: nothing is an instance of them"""
OPS = {"CPUAdamBuilder": True, "FusedAdamBuilder": True}
"""the extensions whose optimizers are here; by class, since NAME is the class's name"""


def _absent_class(name: str) -> type:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name}: is absent here")

    return type(name, (), {"__init__": refuse, "NAME": name})


def _add_module(path: str, names: dict[str, Any]) -> None:
    module = ModuleType(f"deepspeed.{path}")
    module.__dict__.update(names)
    module.__path__ = []
    for package in ("deepspeed", "glm_core.deepspeed"):
        sys.modules[f"{package}.{path}"] = module
    head, _, tail = path.rpartition(".")
    setattr(importlib.import_module(f"deepspeed.{head}" if head else "deepspeed"), tail, module)


def _put_us_in_place() -> None:
    importlib.import_module("glm_core.deepspeed.in_place")
    import deepspeed

    info = dict.fromkeys(("version", "cuda_version", "nccl_version", "hip_version"), "0.0")
    _add_module("git_version_info", {"torch_info": info})
    _add_module("utils.torch", {"required_torch_version": lambda **_: True})
    _add_module("runtime.swap_tensor", {"MIN_SWAPPABLE_BYTES": 1})
    for path in ("runtime.fp16", "runtime.fp16.onebit"):
        _add_module(path, {})
    for path, names in UNUSED.items():
        _add_module(path, {name: _absent_class(name) for name in names})
    deepspeed.ops.__compatible_ops__ = defaultdict(bool, OPS)
    sys.modules.setdefault("hjson", json)
    # what checkpoint/common.py looks at
    deepspeed.DeepSpeedEngine.sparse_tensor_module_names = frozenset()
    deepspeed.DeepSpeedEngine._get_optimizer_ckpt_name = None


if os.environ["THEIR_PEER"] == "ours":
    _put_us_in_place()
else:
    # else every rank would compile an extension for sums in shared memory
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
mp.set_start_method("fork", force=True)
torch.multiprocessing.set_start_method = lambda *_, **__: None


def _rank(test: Any, rank: int, ranks: int, port: str, init: str, end: Any) -> None:
    """Runs one rank and sends what it skipped, or how it failed, through the pipe `end`."""
    try:
        end.send(("done", test._dist_run(rank, ranks, port, init)))
    except BaseException:
        end.send(("failed", traceback.format_exc()))
    end.close()
    sys.stdout.flush()
    os._exit(0)


def _launch(test: Any, ranks: int, init: str) -> None:
    """Takes the place of DistributedExec._launch_procs."""
    from unit.common import get_accelerator, get_master_port

    if get_accelerator().is_available() and get_accelerator().device_count() < ranks:
        pytest.skip(f"{ranks} devices are needed")
    port = get_master_port()
    ends, processes = [], []
    for rank in range(ranks):
        mine, theirs = mp.Pipe(duplex=False)
        process = mp.Process(target=_rank, args=(test, rank, ranks, port, init, theirs))
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        seen = _wait(ends)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failed := [f"rank {r}: {text}" for r, (kind, text) in seen.items() if kind == "failed"]:
        pytest.fail("\n".join(failed), pytrace=False)
    if len(seen) < ranks:
        missing = sorted(set(range(ranks)) - set(seen))
        pytest.fail(f"HANG: ranks {missing} were not done after {LIMIT_S:g} s", pytrace=False)
    if skipped := next((text for _, text in seen.values() if text), ""):
        pytest.skip(skipped)


def _wait(ends: list[Any]) -> dict[int, tuple[str, str]]:
    """Returns what each rank has sent before the time is over."""
    seen: dict[int, tuple[str, str]] = {}
    end = time.monotonic() + LIMIT_S
    waiting = dict(enumerate(ends))
    while waiting and (left := end - time.monotonic()) > 0:
        for ready in mp.connection.wait(list(waiting.values()), timeout=left):
            rank = next(r for r, w in waiting.items() if w is ready)
            del waiting[rank]
            try:
                seen[rank] = ready.recv()  # type: ignore[attr-defined]
            except EOFError:
                seen[rank] = ("failed", "the process died")
            if seen[rank][0] == "failed":
                end = min(end, time.monotonic() + GRACE_S)
    return seen


class _CpuDDP(DistributedDataParallel):
    """DistributedDataParallel on the CPU, for tests that name a device."""

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__(module, **{**options, "device_ids": None, "output_device": None})


torch.nn.parallel.DistributedDataParallel = _CpuDDP  # type: ignore[misc]


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Makes fixtures of DistributedFixture classes, which this pytest would not see."""
    if not isinstance(collector, pytest.Module):
        return
    common = importlib.import_module("unit.common")
    try:
        module = collector.obj
    except (Exception, pytest.skip.Exception):
        return  # pytest reports it
    for name, kind in list(vars(module).items()):
        known = isinstance(kind, type) and issubclass(kind, common.DistributedFixture)
        if known and isinstance(kind.world_size, int) and kind is not common.DistributedFixture:
            setattr(module, name, _fixture(name, kind))


def _fixture(name: str, kind: Any) -> Any:
    def run(request: pytest.FixtureRequest) -> None:
        kind()(request)

    return pytest.fixture(name=name)(run)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes the place of the tests' own processes; leaves out most variants if asked to."""
    if os.environ.get("THEIR_VARIANTS") == "few":
        names = [item.nodeid.partition("[")[0] for item in items]
        last = {name: index for index, name in enumerate(names)}
        first = {name: index for index, name in reversed(list(enumerate(names)))}
        kept = {*last.values(), *first.values()}
        items[:] = [item for index, item in enumerate(items) if index in kept]
    common = importlib.import_module("unit.common")
    common.DistributedExec._launch_procs = _launch
    common.time.sleep = lambda _: None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Writes an outcome down."""
    report = (yield).get_result()
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr or "")
        if report.skipped:
            text = text.rpartition("Skipped: ")[2]
        row = [item.nodeid, report.outcome, round(report.duration, 1), text[-3000:]]
        with open(os.environ["THEIR_OUTCOMES"], "a") as file:
            file.write(json.dumps(row) + "\n")
