"""What strangers read first is true: the README, its pictures, CONTRIBUTING, SECURITY, the issue
form, the window of versions, and the licence."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from rooms import CHAIN, ROOT

from glm_core import cli
from glm_core.cli.skeleton import FILES
from glm_core.versions import tomllib

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
VERSIONS = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
PAGES = ("CONTRIBUTING.md", "SECURITY.md")
KEYS = {"name", "description", "labels", "body"}
ATTRIBUTES = {
    "markdown": {"value"},
    "textarea": {"label", "description", "placeholder", "render", "value"},
    "input": {"label", "description", "placeholder", "value"},
}
"""the hosting platform's schema of issue forms, as far as ours use it"""


def commands(text: str) -> list[list[str]]:
    """The arguments of every `glm-core ...` between backticks."""
    return [shlex.split(c) for c in re.findall(r"`glm-core ([^`]+)`", text)]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_follows_the_schema(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form) <= KEYS
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    ids = [item["id"] for item in fields]
    assert len(ids) == len(set(ids)) == len(fields) > 0
    for item in form["body"]:
        assert set(item) <= {"type", "id", "attributes", "validations"}
        assert set(item["attributes"]) <= ATTRIBUTES[item["type"]]
        assert item["type"] == "markdown" or item["attributes"]["label"]
        assert set(item.get("validations", {})) <= {"required"}


def test_the_bug_form_requires_devices_command_and_expectation() -> None:
    [bug] = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in FORMS if p.stem == "bug"]
    required = {i["id"] for i in bug["body"] if i.get("validations", {}).get("required")}
    assert required >= {"devices", "command", "expected"}
    [devices] = [i for i in bug["body"] if i.get("id") == "devices"]
    assert commands(devices["attributes"]["label"]) == [["devices", "--json"]]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_command_that_a_form_names_is_one(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        if words != ["--version"]:  # would exit
            cli.parser().parse_args(words)


@pytest.mark.parametrize("name", PAGES)
def test_a_command_that_a_page_names_exists(name: str) -> None:
    named = {words[0] for words in commands((ROOT / name).read_text(encoding="utf-8"))}
    assert named
    assert named <= set(cli.COMMANDS)


@pytest.mark.parametrize("name", PAGES)
def test_a_path_that_a_page_names_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    spans = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    paths = [s for s in spans if re.search(r"/.*\.\w+$", s) and not s.startswith("runs/")]
    assert paths
    missing = [p for p in paths if not list(ROOT.glob(re.sub("NAME|FAMILY", "*", p)))]
    assert not missing, f"{name} names {missing}"


def test_make_targets_that_contributing_names_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"`make (\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert named
    assert set(named) <= set(targets)


def test_the_licence_is_whole_and_stated() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 The glm_core authors" in text
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "pictures" / "rooms.py"))
    assert tuple(room for _, _, rooms in script["FLOORS"] for room in rooms) == CHAIN, (
        "docs/pictures/rooms.py: the rooms are not those of CHAIN; add the room to its floor"
    )
    committed = (ROOT / "docs" / "pictures" / "rooms.svg").read_text(encoding="utf-8")
    assert committed == script["draw"](), "rooms.svg: old; run python docs/pictures/rooms.py"
    assert set(CHAIN) <= set(re.findall(r">(\w+)</text>", committed))


def test_the_readme_shows_small_pictures_and_pages_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [Path(p).name for p in pictures] == ["verdict.png", "rooms.svg"]
    assert all((ROOT / p).stat().st_size < 150_000 for p in pictures)
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert not [path for path in linked if not (ROOT / path).exists()]
    pages = {str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")}
    assert pages <= set(linked), "README.md: every page of docs is listed"


def test_the_window_of_versions_is_that_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = dict(re.findall(r"^\| (Python|torch|numpy) \| ([\d.]+) \|", VERSIONS, re.M))
    required = dict(
        re.findall(r"^(torch|numpy)>=([\d.]+)$", "\n".join(project["dependencies"]), re.M)
    )
    assert stated == required | {"Python": project["requires-python"].removeprefix(">=")}


def test_a_new_backend_takes_the_same_pythons() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    new = tomllib.loads(FILES["pyproject.toml"].replace("$name", "acme"))["project"]
    assert new["requires-python"] == own["requires-python"]


def test_every_python_of_the_window_is_a_classifier() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(oldest, newest)] = re.findall(r"^\| Python \| 3\.(\d+) \| 3\.(\d+) \|", VERSIONS, re.M)
    minors = [int(m) for m in re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))]
    assert minors == list(range(int(oldest), int(newest) + 1))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_the_options_of_a_shown_command_exist(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^(?:! |.*run: )?glm-core (.*)$", "\n".join(blocks), re.MULTILINE):
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if "..." not in words:
            cli.parser().parse_args(words)  # exits where one is unknown or missing
