"""Layers import downward only, the core knows no backend by name and no vendor; files are small."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import CHAIN, MODULES, ROOT

CORE = ("errors", "config", "spec", "dispatch", "session", "ops", "model", "data", "training")
VENDORS = {"torch_npu", "torch_xla", "intel_extension_for_pytorch", "onnxruntime", "onnx", "triton"}


def place(module: str) -> int | None:
    """The place of a module's room in the chain."""
    room = module.split(".")[0]
    return CHAIN.index(room) if room in CHAIN else None


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module below glm_core) of every import of ours, those inside functions too, but not
    those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("glm_core."):
                    yield node.lineno, alias.name.removeprefix("glm_core.")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glm_core":
            base = (node.module or "").removeprefix("glm_core").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                yield node.lineno, full if full in MODULES else base or alias.name


def test_every_module_has_a_room() -> None:
    lost = [name for name in MODULES if name not in ("", "__init__") and place(name) is None]
    assert not lost, f"modules of no room: {lost}; add the room to CHAIN"


def test_imports_point_downward() -> None:
    upward = [
        f"{path}:{line} imports {target}"
        for module, path in MODULES.items()
        if (own := place(module)) is not None
        for line, target in imports(path)
        if (level := place(target)) is not None and level > own
    ]
    assert not upward


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "ops.py"
    wrong.write_text("def f():\n    from glm_core.backends import registry\n")
    [(line, target)] = imports(wrong)
    assert (line, target) == (2, "backends.registry")
    assert place(target) > place("ops")  # type: ignore[operator]  # both have one


def test_core_names_no_backend_module() -> None:
    core = [path for m, path in MODULES.items() if m.split(".")[0] in CORE]
    named = {t for path in core for _, t in imports(path) if t.startswith("backends.")}
    assert named <= {"backends.base", "backends.graphs", "backends.registry"}


def test_import_names_are_absolute() -> None:
    relative = [
        f"{path}:{node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, f"relative imports: {relative}"


def loaded_after(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter that ran `code`."""
    report = "; import sys; print(*{m.partition('.')[0] for m in sys.modules}, file=sys.__stderr__)"
    done = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import glm_core",
        "import glm_core.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nNone",
    ],
)
def test_light_imports_load_no_torch(code: str) -> None:
    loaded = loaded_after(code)
    assert "glm_core" in loaded
    assert not loaded & (VENDORS | {"torch", "numpy", "transformers"})


def test_ops_and_registry_load_no_vendor_package() -> None:
    loaded = loaded_after("import glm_core.ops, glm_core.backends.registry as r; r.names()")
    assert "torch" in loaded
    assert not loaded & (VENDORS - {"triton"})  # torch itself imports triton where it is installed


def test_the_compiler_is_loaded_by_those_who_compile_alone() -> None:
    """Importing it takes as long as importing the rest of torch."""
    code = (
        "import sys, glm_core.align.worker, glm_core.serve.server\n"
        "from glm_core.cli import main\n"
        "main(['conformance', '--backend', 'reference', '--id', 'geglu-float32-2x5x48-test'])\n"
        "assert 'glm_core.conformance.oracle' in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["backends", "bench"])
def test_plain_names_say_what_to_write(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:")
    assert f"from glm_core import {name}" in last


SMALL = ("glm_core/spec.py", "glm_core/dispatch.py", "glm_core/align/trace.py", "backends/base.py")
"""the core files"""


@pytest.mark.parametrize("path", SMALL)
def test_core_files_stay_small(path: str) -> None:
    assert length(ROOT / path) <= 150


@pytest.mark.filterwarnings("default")
def test_long_files_are_named() -> None:
    """A warning, no failure: a thing that belongs together is not cut in two for its length."""
    long = {path.relative_to(ROOT): length(path) for path in MODULES.values()}
    for path, lines in long.items():
        if lines > 350:
            warnings.warn(f"{path} has {lines} lines, more than 350", stacklevel=1)


def length(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_functions_stay_small() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[len(lengths) * 9 // 10] <= 40


def test_modules_are_named_for_what_they_hold() -> None:
    nameless = {"utils", "helpers", "common", "misc", "util"}
    parts = ("", "runtime.", "checkpoint.", "moe.")
    deepspeeds = {f"deepspeed.{part}utils" for part in parts}  # scripts import these paths
    assert {m for m in MODULES if m.rpartition(".")[2] in nameless} == deepspeeds


def test_every_module_says_what_it_decides() -> None:
    silent = [
        name
        for name, path in MODULES.items()
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, f"modules without a docstring: {silent}"


def test_what_tests_share_has_a_name_of_its_own() -> None:
    """Folders of tests are on one path: the first `small` would be everybody's."""
    shared = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if not path.name.startswith("test_") and path.name not in ("conftest.py", "__init__.py")
    ]
    assert sorted(shared) == sorted(set(shared))
