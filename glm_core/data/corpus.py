"""Reads the text to train on: any file or folder of text, or this machine's own documentation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from glm_core.config import DataConfig
from glm_core.data import cache, documentation
from glm_core.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order, and their sources."""

    documents: list[str]
    """never blank"""
    parts: dict[str, int]
    """characters taken from each source"""
    missing: dict[str, str]
    """why a source of the default corpus is missing, by source"""
    sha256: str
    """digest of all documents in order"""


def load(config: DataConfig, cache_dir: Path) -> Corpus:
    """Reads `config.path`, or this machine's documentation if it is empty. Raises DataError for a
    file that is missing, unreadable, empty, binary (NUL byte), not UTF-8 (with the byte offset) or
    bad JSONL (with the line)."""
    missing: dict[str, str] = {}
    if config.path:
        root = Path(config.path).expanduser()
        texts = {str(path): read(path, config.text_key) for path in files(root)}
    else:
        root = Path("the machine's documentation")
        texts, missing = documentation.read(cache_dir)
    texts = {part: [text for text in found if text.strip()] for part, found in texts.items()}
    documents = [text for found in texts.values() for text in found]
    if not documents:
        raise DataError(
            f"{root}: holds no text; give a file, a JSONL file or a folder with text in it"
        )
    parts = {part: sum(map(len, found)) for part, found in texts.items()}
    if config.path:
        parts = {root.name: sum(parts.values())}
    return Corpus(documents, parts, missing, cache.digest(documents))


def files(root: Path) -> list[Path]:
    """Returns the file itself, or every file below a folder except hidden ones, sorted by name."""
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; pass text, JSONL or a folder of them")
    if not root.is_dir():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(x.startswith(".") for x in p.relative_to(root).parts))


def read(path: Path, text_key: str) -> list[str]:
    """Returns the documents of one file: the lines of a .jsonl, otherwise the whole file as one
    document."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if (at := raw.find(0)) >= 0:
        raise DataError(f"{path}: binary, NUL at byte {at}; give plain text in UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fact = f"not UTF-8 at byte {error.start} ({error.reason})"
        raise DataError(f"{path}: {fact}; convert it, for example with iconv") from None
    return jsonl(path, text, text_key) if path.suffix == ".jsonl" else [text]


def jsonl(path: Path, text: str, text_key: str) -> list[str]:
    """Returns the field `text_key` of every line, skipping blank lines. Raises DataError that names
    file:line."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            documents.append(field(f"{path}:{number}", line, text_key))
    return documents


def field(where: str, line: str, text_key: str) -> str:
    """Returns the text of one JSON object. Raises DataError that begins with `where`."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}); every line must be one JSON object"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected an object, received {type(value).__name__}; write {{...}}"
        )
    if text_key not in value:
        has = ", ".join(value) or "none"
        raise DataError(f"{where}: no field {text_key!r}, the fields are {has}; set data.text_key")
    text = value[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_key!r} is {type(text).__name__}, not text; set data.text_key"
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(
            f"{where}: half a surrogate pair in {text_key!r}; write the character itself"
        )
    return text
