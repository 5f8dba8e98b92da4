"""A pytest plugin that runs DeepSpeed's own tests on a CPU, under DeepSpeed or under us.

A test's ranks are forked processes. Where one fails, or the time is over, the others are killed.
Each outcome is a line of JSON in the file THEIR_OUTCOMES."""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.multiprocessing
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LIMIT_S = float(os.environ.get("THEIR_LIMIT_S", "60"))
"""for all ranks of one test"""
GRACE_S = 3.0
"""for the other ranks, once one has failed"""
OPS = {"CPUAdamBuilder": True, "FusedAdamBuilder": True}
"""the extensions whose optimizers are here; by class, since NAME is the class's name"""


def _absent_class(name: str) -> type:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name}: is absent here")

    return type(name, (), {"__init__": refuse, "NAME": name})


def _add_module(path: str, names: dict[str, Any]) -> ModuleType:
    module = ModuleType(f"deepspeed.{path}")
    module.__dict__.update(names)
    module.__path__ = []
    for package in ("deepspeed", "glm_core.deepspeed"):
        sys.modules[f"{package}.{path}"] = module
    head, _, tail = path.rpartition(".")
    parent = _module(f"deepspeed.{head}") if head else importlib.import_module("deepspeed")
    setattr(parent, tail, module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        return _add_module(name.removeprefix("deepspeed."), {})


def _add_names(source: Path) -> None:
    """Adds what a file imports from DeepSpeed and is absent here, as classes that cannot be made:
    most tests of a file do not use it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed."):
            module = _module(str(node.module))
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name) and not _is_module(f"{node.module}.{name}"):
                    setattr(module, name, _absent_class(name))


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _put_us_in_place() -> None:
    importlib.import_module("glm_core.deepspeed.in_place")
    import deepspeed

    info = dict.fromkeys(("version", "cuda_version", "nccl_version", "hip_version"), "0.0")
    _add_module("git_version_info", {"torch_info": info})
    _add_module("runtime.swap_tensor", {"MIN_SWAPPABLE_BYTES": 2**20})  # a size of their models
    _add_module("utils.torch", {"required_torch_version": lambda **_: True})
    deepspeed.ops.__compatible_ops__ = defaultdict(bool, OPS)
    sys.modules.setdefault("hjson", json)
    # what checkpoint/common.py looks at
    deepspeed.DeepSpeedEngine.sparse_tensor_module_names = frozenset()
    deepspeed.DeepSpeedEngine._get_optimizer_ckpt_name = None


class _Adam(torch.optim.AdamW):
    """DeepSpeed's Adam classes without the extensions that each would compile for minutes."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _spare_extensions() -> None:
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    adam = importlib.import_module("deepspeed.ops.adam")
    for name in ("FusedAdam", "DeepSpeedCPUAdam"):
        setattr(adam, name, type(name, (_Adam,), {}))
        importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS.append(
            getattr(adam, name)
        )


def _allclose(a: Any, b: Any, **tolerances: Any) -> bool:
    """Compares this rank's elements where DTensors are compared, which torch.allclose refuses."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in (a, b)]
    return bool(_torch_allclose(*parts, **tolerances))


if os.environ["THEIR_PEER"] == "ours":
    _put_us_in_place()
    for helper in (*Path("unit").glob("*.py"), Path("unit/checkpoint/common.py")):
        _add_names(helper)
    _torch_allclose, torch.allclose = torch.allclose, _allclose  # type: ignore[assignment]
else:
    _spare_extensions()
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
    if os.environ["THEIR_PEER"] == "ours":
        _add_names(collector.path)
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
