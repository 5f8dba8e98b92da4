"""The three places that list the CPU's instruction sets agree: kernels.h, setup.py, sanitize.sh."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINES = {"x86_64": "X86", "aarch64": "ARM"}
"""the tables of flags in setup.py"""


def declared(machine: str) -> list[str]:
    """Returns the instruction sets that kernels.h declares for a machine, the best last."""
    text = (ROOT / "csrc/include/kernels.h").read_text(encoding="utf-8")
    found = re.search(rf"defined\(__{machine}__\)\n#define GLM_ISAS\(K\)(.*)", text)
    assert found, machine
    return re.findall(r"K\((\w+)\)", found[1])


def built(machine: str) -> dict[str, str]:
    """Returns the flags of each instruction set in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
            "AVX2",
            "AVX512",
            "X86",
            "ARM",
        ):
            name = ast.unparse(node.targets[0])
            values[name] = eval(ast.unparse(node.value), {}, values)
    table = values[MACHINES[machine]]
    assert isinstance(table, dict)
    return {"scalar": "", **table}


def script_says(function: str, argument: str) -> list[str]:
    """Returns the words that a function of sanitize.sh answers."""
    text = (ROOT / "csrc/tests/sanitize.sh").read_text(encoding="utf-8")
    body = re.search(rf"^{function}\(\) .*?^}}", text, re.MULTILINE | re.DOTALL)
    assert body, function
    script = f"{body[0]}\n{function} {argument}"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("machine", MACHINES)
def test_the_lists_of_instruction_sets_agree(machine: str) -> None:
    isas = declared(machine)
    assert list(built(machine)) == isas == script_says("isas_of", machine)
    for isa, flags in built(machine).items():
        assert set(script_says("flags_of", isa)) == set(flags.split()) - {
            "-mprefer-vector-width=512"
        }
