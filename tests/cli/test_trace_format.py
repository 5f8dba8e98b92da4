"""docs/trace-format.md agrees with glm_core.align.trace_format."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from glm_core.align import trace_format
from glm_core.align.trace import Trace

PAGE = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    """Returns a section's table, by the first cell."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [
        [c.strip(" `") for c in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells[2:]}


def test_every_field_is_documented() -> None:
    documented = {**rows("Fields"), **rows("Arrays")}
    assert set(documented) == {f.name for f in dataclasses.fields(Trace)}
    assert set(rows("Fields")) == set(trace_format.PLAIN)


def test_axes_are_those_that_are_checked() -> None:
    for name, (shape, _) in rows("Arrays").items():
        axes = ["J1" if x == "1 + J" else x for x in shape.strip("[]").split(", ")]
        assert tuple(axes) == trace_format.ARRAYS[name]


def test_keys_of_rows() -> None:
    table = rows("Fields")
    for name in ("calls", "fallbacks", "routing"):
        [keys] = trace_format.PLAIN[name]
        assert re.findall(r"`?(\w+)`?[,:]", f"{table[name][1]}")[: len(keys)] == list(keys)
    [keys] = trace_format.PLAIN["tests"]
    for key in keys.keys() - trace_format.PLAIN["calls"][0].keys():
        assert f"`{key}`" in table["tests"][1]


def test_kind_version_and_bounds() -> None:
    assert rows("Metadata")["kind"] == [trace_format.KIND]
    assert rows("Metadata")["version"] == [str(trace_format.VERSION)]
    bounds = {key: int(value.split()[0]) for key, (value,) in rows("Bounds").items()}
    assert bounds == {"file": trace_format.MAX_BYTES, "fields": trace_format.MAX_FIELDS}
