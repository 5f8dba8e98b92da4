"""Reads known failures from a file: one case pattern and its reason a line. A line that no longer
holds is itself a failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from glm_core.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class KnownFailure:
    """A line of a known-failures file: which cases, and why they fail."""

    pattern: str
    """a case id, or a pattern with *"""
    reason: str
    place: str
    """file:line, to be found again"""

    def fits(self, id: str) -> bool:
        return fnmatchcase(id, self.pattern)


def load(path: Path | str | None) -> list[KnownFailure]:
    """The entries of a file: `ID reason...` per line, # starts a comment; none where there is no
    file. Raises ConfigError for a line without a reason."""
    if path is None or not Path(path).exists():
        return []
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        pattern, _, reason = line.partition("#")[0].strip().partition(" ")
        if pattern and not reason.strip():
            raise ConfigError(f"{path}:{number}: no reason; write `{pattern} why it fails`")
        if pattern:
            entries.append(KnownFailure(pattern, reason.strip(), f"{path}:{number}"))
    return entries


def known_for(id: str, entries: Iterable[KnownFailure]) -> KnownFailure | None:
    """The first entry that fits the case."""
    return next((e for e in entries if e.fits(id)), None)


def unmatched(entries: Iterable[KnownFailure], ids: Iterable[str]) -> list[KnownFailure]:
    """Entries that fit no case at all: stale."""
    ids = list(ids)
    return [e for e in entries if not any(e.fits(id) for id in ids)]
