"""The window of versions: the oldest ones are the same everywhere they are written, older ones get
one line, and each difference in glm_core/versions.py is true, used and works here."""

from __future__ import annotations

import ast
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import MODULES, ROOT

from glm_core import versions
from glm_core.errors import ConfigError
from glm_core.versions import CHANGED, NEWER, PYTHON, TORCH

SOURCES = sorted(
    path
    for folder in ("glm_core", "backends", "bench", "csrc", "examples", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OLDEST_PYTHON = ".".join(map(str, PYTHON))
LOADED_BY_OLDER = ("__init__", "versions")
"""modules that an older Python loads, to be told that it is too old"""


def test_pyproject_says_the_same_oldest_versions() -> None:
    torch = ".".join(map(str, TORCH))
    for line in (
        f'requires-python = ">={OLDEST_PYTHON}"',
        f'target-version = "py{OLDEST_PYTHON.replace(".", "")}"',
        f'python_version = "{OLDEST_PYTHON}"',
    ):
        assert line in PYPROJECT, f"pyproject.toml: {line} is not there"
    assert re.search(rf'^dependencies = \[[^]]*"torch>={re.escape(torch)}"', PYPROJECT, re.M)


def test_sources_parse_as_the_oldest_python() -> None:
    assert len(SOURCES) > 500
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=PYTHON)


def test_sources_use_nothing_newer_than_the_oldest_python(tmp_path: Path) -> None:
    """The tests themselves run with the oldest Python (`make oldest`, `make matrix`)."""
    pytest.importorskip("vermin", reason="vermin is not installed (it is in the extra dev)")
    new = tmp_path / "new.py"
    new.write_text("import tomllib\n")
    assert "3.11" in newer_features([new])
    shipped = [p for p in SOURCES if "tests" not in p.parts]
    assert not newer_features([*shipped, ROOT / "setup.py"])


def newer_features(paths: list[Path]) -> str:
    """What vermin finds in these files that the oldest Python lacks; empty: nothing."""
    words = f"-q -t={OLDEST_PYTHON}- --no-tips -p=1 --exclude long --violations".split()
    words.append("--no-parse-comments")  # none of ours is for vermin; reading them takes a third
    # `long` is a name of ours, and was a type of Python 2
    code = "from vermin import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr).strip() if done.returncode else ""


@pytest.mark.parametrize("module", LOADED_BY_OLDER)
def test_an_older_python_can_load_what_refuses_it(module: str) -> None:
    ast.parse(MODULES[module].read_text(encoding="utf-8"), feature_version=(3, 9))


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("2.6.1+das.opt1", "torch 2.6.1+das.opt1 is too old; install torch 2.7 or newer"),
        ("1.13.1", "torch 1.13.1 is too old; install torch 2.7 or newer"),
        ("2.7.1", ""),
        ("2.10.0a0+git1234", ""),
        ("3.0", ""),
        ("unknown", ""),
        ("", ""),
    ],
)
def test_an_older_torch_is_refused(torch: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "torch_version", lambda: torch)
    assert versions.too_old() == says
    if says:
        with pytest.raises(ImportError, match=re.escape(says)):
            versions.check()
    else:
        versions.check()


def test_an_older_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    assert versions.too_old() == (
        "Python 3.9.18 is too old; run glm_core with Python 3.10 or newer"
    )


def test_a_command_ends_in_one_line(tmp_path: Path) -> None:
    """The metadata of an older torch comes before the real one's."""
    info = tmp_path / "torch-2.5.1+dtk.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1+dtk\n")
    done = subprocess.run(
        [sys.executable, "-m", "glm_core.cli", "devices"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("glm-core: torch 2.5.1+dtk is too old; install torch 2.7 or newer\n")


@pytest.mark.parametrize("name", NEWER)
def test_each_difference_is_true_here(name: str) -> None:
    entry = NEWER[name]
    library, _, since = entry.since.partition(" ")
    assert library in ("Python", "torch")
    running = versions.torch_version() if library == "torch" else platform.python_version()
    newer = numbers(running) >= numbers(since)
    assert newer == (versions._found(entry.where) is not None), f"{running}: {entry}"
    if newer or entry.stand_in:
        assert getattr(versions, name) is not None
        assert versions.lack(name) == ""
    else:
        with pytest.raises(ConfigError, match=rf"does not have it; use {entry.since} or newer"):
            getattr(versions, name)


def numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("name", NEWER)
def test_each_difference_is_still_needed(name: str) -> None:
    """An entry as old as the window's oldest versions, or that nobody imports, is to be deleted."""
    library, _, since = NEWER[name].since.partition(" ")
    assert numbers(since) > (TORCH if library == "torch" else PYTHON)
    assert name in names_from_versions(), f"nothing imports {name} from glm_core.versions"


@functools.cache
def names_from_versions() -> set[str]:
    """The names that modules import from glm_core.versions, and those they ask `lack` about."""
    texts = [path.read_text(encoding="utf-8") for path in MODULES.values()]
    trees = [ast.parse(text) for text in texts if "versions" in text]
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module == "glm_core.versions":
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("lack"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


@pytest.mark.parametrize("change", CHANGED)
def test_each_change_is_asked_for_and_in_the_window(change: str) -> None:
    assert CHANGED[change] > TORCH, f"{change}: every torch of the window does it; delete the entry"
    assert f'"{change}"' in text_outside_versions()


@functools.cache
def text_outside_versions() -> str:
    users = [p for p in SOURCES if p.name != "versions.py" and "tests" not in p.parts]
    return "\n".join(p.read_text(encoding="utf-8") for p in users)


def test_an_unknown_name_is_no_difference() -> None:
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        versions.bogus  # noqa: B018  # asking for it is the test


def test_what_no_version_here_has_names_the_version_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(NEWER, "Far", versions.Newer("torch.optim:Far", "torch 9.1", ""))
    says = f"torch.optim.Far: torch {versions.torch_version()} does not have it; use torch 9.1"
    assert versions.lack("Far").startswith(says)
    with pytest.raises(ConfigError, match=re.escape(says)):
        versions.Far  # noqa: B018  # asking for it is the test


def test_a_stand_in_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the newest version, where it is used by nobody."""
    file = tmp_path / "bytes"
    file.write_bytes(b"glm" * 700_000)
    with file.open("rb") as first, file.open("rb") as second:
        ours = versions._file_digest(first, "sha256").hexdigest()
        assert ours == versions.file_digest(second, "sha256").hexdigest()
    monkeypatch.setattr(versions, "AcceleratorError", RuntimeError)
    assert versions.is_accelerator_error(RuntimeError("CUDA error: an illegal memory access"))
    assert not versions.is_accelerator_error(RuntimeError("shapes differ"))
    assert not versions.is_accelerator_error(ValueError("CUDA error: no"))
