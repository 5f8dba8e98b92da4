"""Checks the bench of collectives: formulas of nccl-tests, columns its parsers read, results by
value. Times themselves are never tested."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import process
import pytest
import torch
from ranks import Ranks

from glm_core.bench import comm as bench
from glm_core.distributed import comm
from glm_core.errors import ConfigError
from glm_core.measure.timing import Timing


@pytest.mark.parametrize(
    ("name", "world", "factor"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 8, 1.75),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 4, 0.75),
        ("all_to_all", 8, 0.875),
        ("p2p", 8, 1.0),
    ],
)
def test_bus_factors_are_those_of_nccl_tests(name: str, world: int, factor: float) -> None:
    assert bench.bus_factor(name, world) == factor


def test_a_row_is_what_nccl_tests_would_print() -> None:
    # 8 ranks, 8 MiB in 1 ms: algbw 8.388608 GB/s
    timing = Timing(seconds=(0.9e-3, 1e-3, 7e-3))
    r = bench.row("all_reduce", 2 << 20, torch.float32, 8, timing, 0)
    assert r["algbw_gb_s"] == pytest.approx(8.388608)
    assert r["busbw_gb_s"] == pytest.approx(14.680064)
    fields = bench.line(r).split()
    assert fields == ["8388608", "2097152", "float", "sum", "-1", "1000.00", "8.39", "14.68", "0"]
    share = bench.row("reduce_scatter", 2 << 20, torch.float32, 8, timing, 3)
    assert (share["size_bytes"], share["count"], share["wrong"]) == (8 << 20, 2 << 17, 3)


def test_shares_are_whole_and_aligned() -> None:
    assert bench.elements(1000, 4, 3) == 3 * 80  # 320 of 333 bytes each
    assert bench.elements(1, 2, 4) == 4 * 8  # never less than one alignment


def test_sizes_and_what_is_no_size() -> None:
    assert bench.parse_bytes("32k") == 32768
    assert bench.sizes(1024, 20000, 4) == [1024, 4096, 16384]
    for text in ("", "0", "4T", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected bytes such as"):
            bench.parse_bytes(text)
    with pytest.raises(ConfigError, match="no such range"):
        bench.sizes(8, 4, 2)


def test_two_processes_of_its_own() -> None:
    words = ["-m", "glm_core.bench.comm", "--json", "--rounds", "2", "--max-bytes", "4K"]
    done = process.run([sys.executable, *words, "--dtype", "bfloat16"])
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert (result["ranks"], result["library"]) == (2, "gloo")
    seen = {(r["op"], r["size_bytes"], r["wrong"]) for r in result["rows"]}
    assert seen == {(op, size, 0) for op in bench.OPERATIONS for size in (1024, 4096)}
    assert all(r["time_us"] > 0 for r in result["rows"])


def test_every_wrong_element_is_counted(ranks: Ranks, tmp_path: Path) -> None:
    job = ranks.run("elastic_workers.wrong_collectives", 2, folder=tmp_path)
    assert job.codes == [0, 0], job.told
    rows = [line.split() for line in job.outputs[1].splitlines()]
    assert [r[1] for r in rows] == ["0"] * 5
    whole = {"all_gather": 16, "reduce_scatter": 8, "all_to_all": 16, "p2p": 16}
    # all_reduce is refilled with this rank's own values, which are the sum where rank 0 gave zero
    assert {r[0]: int(r[2]) for r in rows} == whole | {"all_reduce": zero_free(16)}


def zero_free(count: int) -> int:
    """Elements to which rank 0 contributes something."""
    return int((comm.values(0, count, torch.float32, torch.device("cpu")) != 0).sum())


def test_outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_core.backends import registry

    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"RANK.* not set; start the processes with torchrun"),
        comm.process_group(registry.get("reference")),
    ):
        pass
    assert bench.main(["--processes", "0"]) == 2
