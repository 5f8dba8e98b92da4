"""Holds one vocabulary: no name that could mean four things, no docstring that is a fragment."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rooms import MODULES

VAGUE = {"told", "tells", "asked", "said", "beside", "lessons", "answered", "Moment"}
"""each once named several things in as many files; the field has a word for every one of them"""
FRAGMENT = ("Of ", "With ", "That ", "Those ", "By ", "At ", "To ", "Its ", "Such ")
"""beginnings of docstrings that are no sentence"""


def names(tree: ast.AST) -> Iterator[str]:
    """Yields every name that a module gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def test_names_mean_one_thing_and_docstrings_are_no_fragments() -> None:
    wrong = []
    for path in MODULES.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path}: {name}" for name in VAGUE & set(names(tree))]
        wrong += [f"{path}: {text}" for text in docstrings(tree) if text.startswith(FRAGMENT)]
    assert not wrong


def test_a_fragment_and_a_vague_name_are_seen() -> None:
    tree = ast.parse('def f(told):\n    """Of those the first."""\n')
    assert "told" in set(names(tree))
    assert [text for text in docstrings(tree) if text.startswith(FRAGMENT)]
