"""Collects text that any machine can get: Python's documentation, and Chinese documentation from
Debian packages."""

from __future__ import annotations

import ast
import gzip
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from glm_core.data import cache
from glm_core.errors import DataError

RECIPE = 1
"""version of the extraction; raise it when the same sources give other text, so that old caches are
not read"""
APT_TIMEOUT_S = 30
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "__pycache__"}

Texts = dict[str, list[str]]
"""documents by source"""


def read(cache_dir: Path) -> tuple[Texts, dict[str, str]]:
    """Returns (texts, missing): the documents by source, and the reason for each source that is
    missing. Builds them once and keeps them in `cache_dir`. Prints on stderr what is missing and
    which file to delete to try again."""
    key = cache.digest([str(RECIPE), platform.python_version()])[:16]
    path = cache_dir / f"documentation-{key}.json"
    cache.once(path, lambda: json.dumps(collect(cache_dir), ensure_ascii=False).encode())
    try:
        texts, missing = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from None
    if missing:
        reasons = "; ".join(f"{part}: {reason}" for part, reason in missing.items())
        print(f"data: corpus without {reasons}; delete {path} to try again", file=sys.stderr)
    return texts, missing


def collect(cache_dir: Path) -> tuple[Texts, dict[str, str]]:
    """Reads every source anew. Packages are fetched while Python's documentation is read."""
    with ThreadPoolExecutor(1) as fetching:
        packages = fetching.submit(debian, cache_dir)
        texts: Texts = {"python topics": topics(), "python docstrings": list(docstrings())}
        fetched, missing = packages.result()
    return texts | fetched, missing


def debian(cache_dir: Path) -> tuple[Texts, dict[str, str]]:
    """Reads the Debian packages. Returns what `collect` does of them."""
    texts: Texts = {}
    missing: dict[str, str] = {}
    for package, read_package in PACKAGES.items():
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            try:
                unpack(package, Path(folder))
                texts[package] = read_package(Path(folder))
            except (DataError, OSError, ValueError) as error:
                missing[package] = str(error)
    return texts, missing


def topics() -> list[str]:
    """Returns the language reference behind `help('if')`."""
    from pydoc_data.topics import topics as by_name

    return [by_name[name] for name in sorted(by_name)]


def docstrings() -> Iterator[str]:
    """Yields one document per module of the standard library: its docstrings, each under its
    qualified name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if not SKIPPED.intersection(inner.parts):
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the library's own invalid escapes are not ours to report
                tree = ast.parse(path.read_bytes())
            name = ".".join(inner.with_suffix("").parts).removesuffix(".__init__")
            if found := list(documented(tree, name)):
                yield "\n\n".join(found) + "\n"


def documented(node: ast.AST, name: str) -> Iterator[str]:
    """Yields `name` or `name(arguments)`, a newline and the docstring, for the node and everything
    inside it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if text := ast.get_docstring(node):
            arguments = getattr(node, "args", None)
            yield f"{name}({ast.unparse(arguments)})\n{text}" if arguments else f"{name}\n{text}"
        for child in node.body:
            yield from documented(child, f"{name}.{getattr(child, 'name', '')}")


def unpack(package: str, folder: Path) -> None:
    """Downloads a Debian package and unpacks it into `folder`, without root. Raises DataError with
    the reason."""
    command(["apt-get", "-o", "Acquire::Retries=0", "download", package], folder)
    for archive in folder.glob("*.deb"):
        command(["dpkg", "-x", archive.name, "."], folder)


def command(words: list[str], folder: Path) -> None:
    """Runs a program in `folder` with a time limit. Raises DataError with the last line of its
    stderr."""
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise DataError(f"{words[0]} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{words[0]} failed ({error})") from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise DataError(f"{words[0]} failed ({last})")


def manpages(folder: Path) -> list[str]:
    """Returns the simplified Chinese manual pages; zh_TW holds the same text, converted."""
    pages = sorted((folder / "usr/share/man/zh_CN").rglob("*.gz"))
    return [plain(gzip.decompress(page.read_bytes()).decode()) for page in pages]


ESCAPES = [
    (
        re.compile(r"\\f(?:\(..|\[[^]]*\]|.)|\\s[-+]?\d|\\[*n](?:\(..|\[[^]]*\]|.)|\\[&/,|^:%cdu]"),
        "",
    ),
    (re.compile(r"\\(?:\(en|\(em|\(hy|-)"), "-"),
    (re.compile(r"\\\(?(?:aq|cq|oq)"), "'"),
    (re.compile(r"\\\(?(?:lq|rq|dq)"), '"'),
    (re.compile(r"\\\(bu"), "*"),
    (re.compile(r"\\\((?:..)|\\\".*"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\(?:e|\(rs|\\)"), r"\\"),
]
REQUESTS = (
    "so TP RS RE PD nf fi in ti ad na hy nh if ie el de ds nr ta ft sp br ne ll PP P LP HP EX EE "
    "TS TE UE UR ig rm rn als"
)
LAYOUT = re.compile(rf"[.'][ \t]*(?:\\|\.|$|(?:{'|'.join(REQUESTS.split())})(?!\w))")
MACRO = re.compile(r"^\.de.*?^\.\.$", re.DOTALL | re.MULTILINE)


def plain(page: str) -> str:
    """Removes the formatting of a manual page."""
    lines = []
    for line in MACRO.sub("", page).splitlines():
        if line[:1] in (".", "'"):
            if LAYOUT.match(line):
                continue
            words = line.split(maxsplit=1)
            title = words[0] in (".SH", ".SS", ".TH", ".Sh", ".Ss")
            line = "\n" * title + (words[1].replace('"', "") if len(words) > 1 else "")
        for pattern, text in ESCAPES:
            line = pattern.sub(text, line)
        lines.append(line)
    return "\n".join(lines).strip() + "\n"


def fortunes(folder: Path) -> list[str]:
    """Returns poems and sayings, one document each, without their terminal colours."""
    files = sorted(f for f in (folder / "usr/share/games/fortunes").iterdir() if not f.suffix)
    whole = "\n%\n".join(f.read_text(encoding="utf-8") for f in files)
    return re.sub(r"\x1b\[\d*m", "", whole).split("\n%\n")


def reference(folder: Path) -> list[str]:
    """Returns the Debian reference, one document per numbered chapter or section."""
    book = folder / "usr/share/debian-reference/debian-reference.zh-cn.txt.gz"
    text = gzip.decompress(book.read_bytes()).decode()
    return re.split(r"\n(?=\d+\.\d+\. )", text)


PACKAGES: dict[str, Callable[[Path], list[str]]] = {
    "manpages-zh": manpages,
    "fortunes-zh": fortunes,
    "debian-reference-zh-cn": reference,
}
