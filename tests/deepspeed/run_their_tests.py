"""Runs DeepSpeed's own tests on the CPU, under DeepSpeed or under us.

    python tests/deepspeed/run_their_tests.py theirs|ours CHECKOUT OUT [TEST ...]

CHECKOUT is a checkout of DeepSpeed. A TEST is a file under tests/unit, with ::CLASS::NAME if not
all of it; without any, all files of FOLDERS run. OUT.jsonl gets a line per test: name, outcome,
seconds, and the reason."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FOLDERS = ("v1/zero", "v1/half_precision", "checkpoint", "pipe", "runtime")
LEFT_OUT = ("tensor_parallel", "zenflow", "rollout", "autotp", "onebit", "sparse_tensor", "nvme")
"""parts of DeepSpeed that glm_core.deepspeed does not have"""


def files(unit: Path) -> list[str]:
    """Returns the files that run where none is named."""
    found = [p for folder in FOLDERS for p in sorted((unit / folder).rglob("test_*.py"))]
    names = [str(p.relative_to(unit)) for p in found]
    return [n for n in names if not any(part in n for part in LEFT_OUT)]


def run(options: argparse.Namespace) -> int:
    """Runs the tests in one pytest; returns its exit code."""
    tests, out = options.checkout.resolve() / "tests", options.out.resolve()
    ours = options.peer == "ours"
    paths = [str(HERE), str(tests)] + ([str(ROOT)] if ours else [])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "8",  # the number of devices
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": ":".join(paths),
        "THEIR_PEER": options.peer,
        "THEIR_OUTCOMES": f"{out}.jsonl",
        "THEIR_LIMIT_S": str(options.limit_s),
        "THEIR_VARIANTS": "few" if options.few else "all",
    }
    python = sys.executable if ours else str(ROOT / ".venv-deepspeed/bin/python")
    command = [python, "-m", "pytest", "-q", "-p", "their_plugin", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--timeout={options.limit_s * 2}"]
    command += [f"--basetemp={out}_tmp", "-W", "ignore", "-k", options.k]
    command += [f"unit/{name}" for name in options.tests or files(tests / "unit")]
    with open(f"{out}.log", "w") as log:
        return subprocess.run(command, cwd=tests, env=env, stdout=log, stderr=log).returncode


def summary(outcomes: Path) -> list[str]:
    """Returns a line per file."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in outcomes.read_text().splitlines():
        name, outcome, *_ = json.loads(line)
        counts[name.partition("::")[0]][outcome] += 1
    return [
        f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(by_kind.items()))
        for name, by_kind in counts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("theirs", "ours"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tests", nargs="*")
    parser.add_argument("-k", default="", help="pytest's")
    parser.add_argument(
        "--few", action="store_true", help="of each test the first and last variant"
    )
    parser.add_argument("--limit-s", type=float, default=60, help="time limit of a test")
    options = parser.parse_args()
    outcomes = Path(f"{options.out}.jsonl")
    outcomes.write_text("")
    code = run(options)
    print(*summary(outcomes), f"pytest ended with {code}", sep="\n")


if __name__ == "__main__":
    main()
