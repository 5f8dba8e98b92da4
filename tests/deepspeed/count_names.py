"""Counts how often public scripts use which of DeepSpeed's names:

    python count_names.py DEEPSPEED_PACKAGE REPOSITORY... > names.json

Module names are counted where imports resolve to them; the engine's by name alone, on any object,
in files that import deepspeed. No script is run."""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path

USUAL = {
    "step",
    "backward",
    "forward",
    "train",
    "eval",
    "__init__",
    "__getattr__",
    "__del__",
    "scale",
    "config",
    "optimizer",
    "device",
    "module",
    "zero_grad",
    "compile",
    "loss_scale",
    "get_lr",
    "log_level",
}
"""names of the engine's that other objects have as well: not counted"""


def engine_names(package: Path) -> set[str]:
    """Returns what the engines define, without names as usual as `step`."""
    found = set()
    for path in ("runtime/engine.py", "runtime/pipe/engine.py"):
        for node in ast.parse((package / path).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in (
                "DeepSpeedEngine",
                "PipelineEngine",
            ):
                found |= {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
    return {n for n in found - USUAL if not n.startswith("_")}


class Names(ast.NodeVisitor):
    """Counts the names of one file."""

    def __init__(self, engine: set[str]) -> None:
        self.engine = engine
        self.alias: dict[str, str] = {}
        self.found: Counter[str] = Counter()

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if name.name.partition(".")[0] == "deepspeed":
                self.alias[name.asname or "deepspeed"] = name.name if name.asname else "deepspeed"
                if name.name != "deepspeed":
                    self.found[name.name] += 1

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] == "deepspeed" and not node.level:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                self.alias[name.asname or name.name] = whole
                self.found[whole] += 1

    def visit_Attribute(self, node: ast.Attribute) -> None:
        words, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            words, inner = [inner.attr, *words], inner.value
        called = (
            inner.func.id
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name)
            else ""
        )
        if isinstance(inner, ast.Name) and inner.id in self.alias:
            self.found[".".join([self.alias[inner.id], *words])] += 1
            return
        if self.alias.get(called, "").endswith("get_accelerator"):
            self.found[f"get_accelerator().{words[0]}"] += 1
        elif self.alias and node.attr in self.engine:
            self.found[f"engine.{node.attr}"] += 1
        self.generic_visit(node)


def count(repository: Path, engine: set[str]) -> Counter[str]:
    """Counts the uses in all Python files of a repository."""
    total: Counter[str] = Counter()
    for path in sorted(repository.rglob("*.py")):
        text = path.read_text(errors="replace")
        if "deepspeed" in text:
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue
            names = Names(engine)
            names.visit(tree)
            total += names.found
    return total


def main(package: str, repositories: list[str]) -> None:
    engine = engine_names(Path(package))
    uses = {Path(r).name: count(Path(r), engine) for r in repositories}
    names: Counter[str] = sum(uses.values(), Counter())
    table = {
        name.removeprefix("deepspeed."): {r: c[name] for r, c in uses.items() if c[name]}
        for name, _ in sorted(names.items(), key=lambda item: (-item[1], item[0]))
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
