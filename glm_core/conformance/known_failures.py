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
    """file:line"""

    def fits(self, id: str) -> bool:
        """Does the case belong to this line?"""
        return fnmatchcase(id, self.pattern)


def load(path: Path | str | None) -> list[KnownFailure]:
    """Reads a file of `ID reason...` lines, where # starts a comment. Returns no entries where
    there is no file. Raises ConfigError for a line without a reason."""
    if path is None or not Path(path).exists():
        return []
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        pattern, _, reason = line.partition("#")[0].strip().partition(" ")
        if pattern and not reason.strip():
            raise ConfigError(
                f"{path}:{number}: known failure without a reason; write `{pattern} why it fails`"
            )
        if pattern:
            entries.append(KnownFailure(pattern, reason.strip(), f"{path}:{number}"))
    return entries


def known_for(id: str, entries: Iterable[KnownFailure]) -> KnownFailure | None:
    """Returns the first entry that fits the case, or None."""
    return next((e for e in entries if e.fits(id)), None)


def unmatched(entries: Iterable[KnownFailure], ids: Iterable[str]) -> list[KnownFailure]:
    """Returns the stale entries: those that fit no case at all."""
    ids = list(ids)
    return [e for e in entries if not any(e.fits(id) for id in ids)]
