"""The map, docs/architecture.md: every path it names is there, and every room is on it."""

from __future__ import annotations

import ast
import re

import pytest
from rooms import CHAIN, ROOT

MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(
    {
        word
        for span in re.findall(r"`([^`\n]+)`", MAP)
        for word in [span.partition("::")[0]]
        if "/" in word and re.fullmatch(r"[\w./*-]+", word)
    }
)
"""paths between backticks; `FILE::name` names something in a file"""
SYMBOLS = sorted(set(re.findall(r"`([\w./]+\.py)::(\w+(?:\.\w+)?)`", MAP)))
PLACEHOLDERS = ("NAME", "FAMILY")
"""a path with one of these is a pattern: where a new file goes"""


def test_the_map_names_paths_and_definitions() -> None:
    assert len(NAMED) > 40
    assert len(SYMBOLS) > 10


@pytest.mark.parametrize("path", NAMED)
def test_a_named_path_is_there(path: str) -> None:
    for word in PLACEHOLDERS:
        path = path.replace(word, "*")
    assert list(ROOT.glob(path.rstrip("/"))), (
        f"docs/architecture.md names {path}, which is not there"
    )


@pytest.mark.parametrize(("path", "name"), SYMBOLS)
def test_a_named_definition_is_there(path: str, name: str) -> None:
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        defined = {n.name: n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assert part in defined, f"docs/architecture.md names {name} in {path}, which is not there"
        body = defined[part].body


@pytest.mark.parametrize("room", CHAIN)
def test_every_room_is_on_the_map(room: str) -> None:
    assert re.search(rf"^\s*{room}(/|\.py)? ", MAP, re.M), f"docs/architecture.md leaves {room} out"


def test_the_chain_on_the_map_is_the_one_that_is_held() -> None:
    [chain] = re.findall(r"```text\n(errors[^`]+)```", MAP)
    assert tuple(re.findall(r"\w+", chain)) == CHAIN
