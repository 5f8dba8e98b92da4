"""A trace comes from another machine: whatever is in the file, `load` gives a Trace or one
TraceError, and what it lets through `compare`, `show` and `fallbacks` can work with. Nothing is
run, nothing grows."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from glm_core import align
from glm_core.align import fallbacks
from glm_core.align.trace import Trace, load
from glm_core.cli.trace import one_line, summary
from glm_core.config import ModelConfig, RunConfig, to_dict
from glm_core.errors import GlmCoreError, TraceError

N, K, S, P, J, C, W = 6, 4, 2, 3, 4, 2, 8
PLACE = {"step": 1, "call": 0, "op": "rope", "layer": "0", "direction": "forward", "tensor": "y"}
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def whole() -> Trace:
    """A small trace with something in every field."""
    r = np.random.default_rng(0)
    loss = np.linspace(6, 5, N)
    row = {**PLACE, "dtype": "float32", "shape": [2, 3], "projection": "scale"}
    return Trace(
        config=to_dict(RunConfig(model=ModelConfig(num_layers=2))),
        backend="cpu",
        dtype="float32",
        loss=loss,
        grad_norm=np.ones(N),
        control_names=[f"{k}: ulp" for k in range(K)],
        control_loss=loss + 1e-6 * r.standard_normal((K, N)),
        capture_steps=[1, 5],
        parameters=["a", "b", "c"],
        gradient_norm=np.ones((S, P)),
        gradient_sketch=r.standard_normal((S, P, W)),
        loss_error=np.full((1 + J, S), 1e-7),
        gradient_error=np.full((1 + J, S, P), 1e-7),
        disguises=[f"d{j}" for j in range(J)],
        calls=[PLACE] * C,
        digest=r.standard_normal((C, W)),
        tests=[row, row],
        test_values=np.array([[1e-8, 1e-8, 1e-5]] * 2),
        num_tests=100,
        fallbacks=[{"op": "rope", "reason": "no kernel", "count": 12}],
        environment={"cpu": "one"},
        data_order="d",
        initial_weights="w",
        seconds=1.5,
    )


@functools.cache
def parts() -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Returns the file of `whole()`, its plain fields and its arrays."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.trace"
        whole().save(path)
        content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fields"])
    return content, fields, load_arrays(content)


def written(fields: Any, arrays: dict[str, Any] | None = None, **metadata: str) -> bytes:
    """Returns a file of these fields and arrays, otherwise as `save` writes it."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    facts = {"kind": "glm_core trace", "version": "1", "fields": text} | metadata
    return bytes(save_arrays(parts()[2] if arrays is None else arrays, facts))


def survives(content: bytes, path: Path) -> Trace | None:
    """Reads the file and uses what was read; whatever goes wrong must be a one-line error."""
    path.write_bytes(content)
    found: list[Trace] = []
    tell(lambda: found.append(load(path)))
    for it in found:
        tell(functools.partial(align.compare, whole(), it))
        tell(functools.partial(align.compare, it, whole()))
        tell(functools.partial(fallbacks.recorded, it))
        assert one_line(summary(it)).isprintable()
    return found[0] if found else None


def tell(use: Callable[[], Any]) -> None:
    """Runs the function. An error of ours must be one short line; any other error is a crash."""
    message = ""
    try:
        use()
    except GlmCoreError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 700


def test_the_seed_itself_loads(tmp_path: Path) -> None:
    """The untouched file loads; otherwise the fuzzer would test nothing."""
    found = survives(parts()[0], tmp_path / "x")
    assert found is not None
    assert found.calls == [PLACE] * C
    assert survives(written(parts()[1]), tmp_path / "x") is not None


@FUZZ
@given(st.data())
def test_truncated(tmp_path: Path, data: st.DataObject) -> None:
    content = parts()[0]
    assert survives(content[: data.draw(st.integers(0, len(content) - 1))], tmp_path / "x") is None


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=20))
def test_bytes_flipped(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(parts()[0])
    for place, mask in flips:
        content[place % len(content)] ^= mask
    survives(bytes(content), tmp_path / "x")


@FUZZ
@given(st.integers(0, 1 << 20), st.integers(0, 64), st.binary(max_size=64))
def test_bytes_replaced_inserted_and_deleted(
    tmp_path: Path, place: int, gone: int, new: bytes
) -> None:
    content = parts()[0]
    at = place % len(content)
    survives(content[:at] + new + content[at + gone :], tmp_path / "x")


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes(tmp_path: Path, content: bytes, framed: bool) -> None:
    prefix = struct.pack("<Q", len(content)) if framed else b""
    assert survives(prefix + content, tmp_path / "x") is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=8)
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**40, 10**6, -1, 0, "\x1b[2J", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all nodes except the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        found
        for key, inner in items
        for found in (
            [(*path, key)]
            + (places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [])
        )
    ]


@FUZZ
@given(st.data())
def test_any_field_becomes_anything(tmp_path: Path, data: st.DataObject) -> None:
    fields = copy.deepcopy(parts()[1])
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(fields)
        if not found:
            break
        *path, last = data.draw(st.sampled_from(found))
        node = functools.reduce(lambda at, key: at[key], path, fields)
        if data.draw(st.booleans()):
            node[last] = data.draw(JSON)
        else:
            del node[last]
    survives(written(fields), tmp_path / "x")


@FUZZ
@given(st.data())
def test_any_array_becomes_any_other(tmp_path: Path, data: st.DataObject) -> None:
    arrays = dict(parts()[2])
    name = data.draw(st.sampled_from([*arrays, "stranger"]))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = data.draw(st.sampled_from(["f8", "f4", "f2", "i8", "u1", "?"]))
    values = data.draw(st.sampled_from([0.0, 1.0, np.nan, np.inf, -np.inf, 1e308, -1e-320]))
    if data.draw(st.booleans()):
        with np.errstate(all="ignore"):
            arrays[name] = np.full(shape, values).astype(dtype)
    elif name in arrays and arrays[name].size:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[data.draw(st.integers(0, arrays[name].size - 1))] = values
    survives(written(parts()[1], arrays), tmp_path / "x")


@pytest.mark.parametrize("name", ["loss_error", "gradient_error", "test_values", "loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_in_a_candidate_diverges(
    tmp_path: Path, name: str, value: float
) -> None:
    arrays = dict(parts()[2])
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] = value
    found = survives(written(parts()[1], arrays), tmp_path / "x")
    assert found is not None
    assert align.compare(whole(), found).verdict == "diverged"
    assert align.compare(whole(), whole()).verdict == "aligned"


HOSTILE = {
    "deep-lists": "[" * 100_000,
    "deep-tables": '{"a":' * 100_000,
    "deep-in-config": '{"config":' + "[" * 5000 + "]" * 5000 + "}",
    "a-number-of-5000-digits": '{"seconds":' + "9" * 5000 + "}",
    "not-json": "{'config': 1}",
    "empty": "",
    "a-list": "[1, 2]",
    "nothing": "null",
    "a-bare-nan": "NaN",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_fields(tmp_path: Path, text: str) -> None:
    assert survives(written(text), tmp_path / "x") is None


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("model", "num_layers", 10**6),
        ("model", "num_heads", 10**12),
        ("model", "ffn", 1 << 52),
        ("model", "hidden", 1 << 40),
        ("model", "max_length", 1 << 52),
        ("data", "length", 500),
        ("train", "global_batch", 1 << 52),
        ("train", "lr", 10**400),
        ("train", "dtype", "int8"),
        ("train", "seed", True),
        ("data", "path", "a\nb"),
        ("model", "norm", "x" * 10**6),
        ("model", "norm", []),
        ("model", "norm", {}),
        ("train", "x" * 10**6, 1),
        ("train", "\x1b[2J", 1),
    ],
    ids=lambda v: ascii(v)[:16],
)
def test_hostile_configs(tmp_path: Path, table: str, key: str, value: Any) -> None:
    fields = copy.deepcopy(parts()[1])
    fields["config"][table][key] = value
    survives(written(fields), tmp_path / "x")


@pytest.mark.parametrize(
    "facts",
    [{"version": "2"}, {"version": "1\n" * 5000}, {"kind": "\x1b[2J" * 5000}, {"kind": ""}],
    ids=["next-version", "long-version", "control-characters", "no-kind"],
)
def test_foreign_metadata(tmp_path: Path, facts: dict[str, str]) -> None:
    assert survives(written(parts()[1], None, **facts), tmp_path / "x") is None


def test_a_terminal_is_not_driven(tmp_path: Path) -> None:
    fields = copy.deepcopy(parts()[1])
    fields["backend"] = fields["environment"]["\x1b]0;x\x07"] = "\x1b[2J\n"
    found = survives(written(fields), tmp_path / "x")
    assert found is not None
    assert "\\x1b[2J\\n" in one_line(summary(found))


def header(**arrays: Any) -> bytes:
    """Returns a safetensors file with this header and no data."""
    text = json.dumps(arrays).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        header(loss={"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}),
        header(loss={"dtype": "F64", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}),
        header(loss={"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}),
        header(loss={"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}),
        header(loss={"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}),
        header(loss={"dtype": "F64", "shape": [0, 1 << 60], "data_offsets": [0, 0]}),
        header(loss={"dtype": "object", "shape": [0], "data_offsets": [0, 0]}),
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
    ],
    ids=[
        "8-tb",
        "overflow",
        "negative",
        "bfloat16",
        "float8",
        "empty-of-2-60",
        "objects",
        "header-of-4-eb",
        "header-of-100-mb",
    ],
)
def test_headers_that_promise_what_is_not_there(tmp_path: Path, content: bytes) -> None:
    assert survives(content, tmp_path / "x") is None


def test_nothing_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    assert survives(pickle.dumps(Bomb()), tmp_path / "x") is None
    np.save(tmp_path / "y.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    assert survives((tmp_path / "y.npy").read_bytes(), tmp_path / "x") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["missing", "folder", "fifo", "nul", "surrogate", "device"])
def test_places_that_are_no_file(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    names = {"nul": "a\0b", "surrogate": "a\udcff", "device": "/dev/zero"}
    with pytest.raises(TraceError, match="cannot be read") as caught:
        load(str(tmp_path / names.get(place, place)))
    assert "\n" not in str(caught.value)


def test_what_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    huge = dataclasses.replace(whole(), backend="x" * (1 << 24))
    with pytest.raises(TraceError, match="capture fewer steps"):
        huge.save(tmp_path / "huge.trace")
    with pytest.raises(TraceError, match="cannot be written"):
        whole().save("/dev/full/x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(TraceError, match="cannot be written"):
        whole().save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_trace_is_readable_by_those_who_may_read_its_folder(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        whole().save(tmp_path / "new" / "a.trace")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.trace").stat().st_mode & 0o777 == 0o644


GIGABYTES = """
import resource, sys
from glm_core.errors import TraceError
from glm_core.align.trace import load
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    load(sys.argv[1])
except TraceError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["data", "fields"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """A sparse file of 8 GB, well formed; 90 MB of fields that would take gigabytes as objects."""
    path = tmp_path / "x"
    if kind == "data":
        size = 8 << 30
        array = {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}
        path.write_bytes(header(loss=array))
        os.truncate(path, path.stat().st_size + size)
    else:
        path.write_bytes(written("[" + "[]," * 30_000_000 + "[]]"))
    done = subprocess.run(
        [sys.executable, "-c", GIGABYTES, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "at most" in done.stdout
