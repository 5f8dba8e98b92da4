"""Finds the private names of torch's that our sources use: what is imported, what is reached
through an imported module, attributes that nothing of ours defines, and methods replaced."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rooms import ROOT

PYTHONS = {
    "_replace",
    "_asdict",
    "_fields",
    "_missing_",
    "_name_",
    "_value_",
    "_generate_next_value_",
}
"""of Python's own classes"""
HOLDERS = {"torch.distributed._functional_collectives"}
"""modules that are imported whole: what is used of them counts"""


def sources() -> Iterator[tuple[str, list[ast.AST]]]:
    """Yields path and the nodes of the syntax tree of every module of the product."""
    for folder in ("glm_core", "backends", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield str(path.relative_to(ROOT)), nodes_of(path.read_text(encoding="utf-8"))


def nodes_of(source: str) -> list[ast.AST]:
    """Returns the nodes of a text's syntax tree, outer ones before inner ones: walking costs more
    than parsing."""
    return list(ast.walk(ast.parse(source)))


def used() -> dict[str, set[str]]:
    """Returns the files that use each private name of torch's. A name is `torch.module._name`; what
    belongs to an object whose type the syntax does not show is `._name`."""
    modules = list(sources())
    ours = {name for _, nodes in modules for name in _defined(nodes)} | PYTHONS
    found: dict[str, set[str]] = defaultdict(set)
    for path, nodes in modules:
        for name in _names(nodes, ours):
            found[name].add(path)
    return dict(found)


def names_in(source: str) -> set[str]:
    """Returns the private names of torch's in this text."""
    return set(_names(nodes_of(source), PYTHONS))


def _names(nodes: list[ast.AST], ours: set[str]) -> Iterator[str]:
    imports = dict(_imports(nodes))
    yield from (n for n in imports.values() if _is_torchs(n) and is_private(n) and n not in HOLDERS)
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from _replaced(node, imports)
        if not isinstance(node, ast.Attribute):
            continue
        root, *rest = _dotted(node).split(".")
        whole = ".".join([imports.get(root, root), *rest])
        if _is_torchs(whole):
            if id(node) not in inner and is_private(whole):
                yield whole
        elif is_private(node.attr) and node.attr not in ours and root not in imports:
            yield f".{node.attr}"


def _imports(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Yields what each imported name stands for."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                yield (a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Assign) and _is_torchs(_dotted(node.value)):
            yield from (
                (t.id, _dotted(node.value)) for t in node.targets if isinstance(t, ast.Name)
            )


def _replaced(node: ast.ClassDef, imports: dict[str, str]) -> Iterator[str]:
    """Yields the private methods of torch's that this class replaces."""
    for base in node.bases:
        root, *rest = _dotted(base).split(".")
        name = ".".join([imports.get(root, root), *rest])
        if not _is_torchs(name):
            continue
        methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
        kind = resolved(name)
        yield from (f"{name}.{m}" for m in methods if is_private(m) and hasattr(kind, m))


def _defined(nodes: list[ast.AST]) -> Iterator[str]:
    """Yields every private name that this module of ours gives to something."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def is_private(name: str) -> bool:
    """Says whether a part of the dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _is_torchs(name: str) -> bool:
    return name.split(".")[0] == "torch"


def resolved(name: str) -> Any:
    """Returns what the dotted name stands for. Raises AttributeError where there is no such
    thing."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:number]))
            except ModuleNotFoundError:
                raise AttributeError(f"{name} does not exist") from None
    return found
