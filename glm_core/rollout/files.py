"""Defines a rollout: replies as token ids with their log probabilities; reads and writes it as JSON
lines (docs/rollout.md)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.config import check
from glm_core.errors import ConfigError, RolloutError, in_one_line, unknown

Array = NDArray[np.float64]
FORMAT = "glm-core rollout 1"
"""the value of `format` in the first line of a file"""
DTYPES = ("float32", "bfloat16", "float16")
TYPES = {
    "engine": str,
    "dtype": str,
    "tokenizer": str,
    "processed": bool,
    "before_top_p": bool,
    "chunk": int,
}
"""by setting: its type; the others are numbers"""
WORDS = {str: "text", bool: "true or false", int: "a whole number"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the tokens were drawn, and what the log probabilities belong to. A field at its default
    says nothing where it could not be known."""

    engine: str = ""
    """what computed the log probabilities"""
    dtype: str = ""
    """dtype of the weights and the arithmetic"""
    tokenizer: str = ""
    """a name or checksum of the tokenizer"""
    temperature: float | None = None
    """None = unknown, which counts as 1; 0 = always the most likely token"""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    processed: bool = False
    """whether the log probabilities belong to the distribution after penalty, temperature and
    top-p; False: to the model's own"""
    before_top_p: bool = False
    """whether processed log probabilities are those before top-p, as SGLang's are"""
    chunk: int = 0
    """tokens of a prompt that the engine reads at once; 0 = unknown"""

    def __post_init__(self) -> None:
        temperature = self.temperature
        check(
            self,
            {k: type(getattr(self, k)) is t or f"must be {WORDS[t]}" for k, t in TYPES.items()},
            {
                "dtype": self.dtype in ("", *DTYPES) or f"must be one of {', '.join(DTYPES)}",
                "temperature": temperature is None
                or (temperature > 0 or (temperature == 0 and not self.processed))
                or "must be positive; 0 only where the log probabilities are not processed",
                "top_p": 0 < self.top_p <= 1 or "must lie in (0, 1]",
                "repetition_penalty": self.repetition_penalty > 0 or "must be positive",
            },
        )


MUST_AGREE = (
    "tokenizer",
    "temperature",
    "top_p",
    "repetition_penalty",
    "processed",
    "before_top_p",
)
"""settings that two files of the same tokens must share"""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One sampled continuation of a prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """one for each token"""
    step: int = 0
    """number of the weights that drew it: the update it belongs to"""
    cached: int = 0
    """tokens of the prompt whose keys and values came from a prefix cache"""

    def __post_init__(self) -> None:
        if strange := [n for n in (self.step, self.cached) if type(n) is not int or n < 0]:
            raise RolloutError(
                f"reply: step and cached must be whole numbers from 0, received {strange[0]!r}"
            )
        if not self.prompt or not self.tokens:
            raise RolloutError("reply: prompt and tokens must not be empty; leave such replies out")
        if len(self.tokens) != len(self.logprobs):
            raise RolloutError(
                f"reply: {len(self.tokens)} tokens and {len(self.logprobs)} logprobs; give one "
                "log probability for each token"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
    """Replies of one engine."""

    settings: Settings
    replies: tuple[Reply, ...]
    name: str = ""
    """file it was read from"""

    @property
    def logprobs(self) -> Array:
        """Returns the log probabilities of all tokens, reply after reply."""
        return np.array([x for r in self.replies for x in r.logprobs], dtype=np.float64)

    def given(self, logprobs: Array, **settings: Any) -> Rollout:
        """Returns the same replies with other log probabilities and some other settings."""
        ends = np.cumsum([len(r.tokens) for r in self.replies])
        parts = np.split(np.asarray(logprobs, dtype=np.float64), ends[:-1])
        replies = tuple(
            dataclasses.replace(r, logprobs=tuple(part.tolist()))
            for r, part in zip(self.replies, parts, strict=True)
        )
        return Rollout(dataclasses.replace(self.settings, **settings), replies)


def per_token(replies: Sequence[Reply]) -> dict[str, NDArray[Any]]:
    """Returns for every token of all replies, in order: `reply`, its number; `step`; `place`, the
    token's index in prompt and reply; `prompt`, the prompt's length; `cached`; and `repeated`,
    whether the token stands before itself."""
    columns: dict[str, list[Any]] = {
        k: [] for k in ("reply", "step", "place", "prompt", "cached", "repeated")
    }
    for number, r in enumerate(replies):
        seen = set(r.prompt)
        for i, token in enumerate(r.tokens):
            values = (number, r.step, len(r.prompt) + i, len(r.prompt), r.cached, token in seen)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            seen.add(token)
    return {name: np.array(values) for name, values in columns.items()}


def save(rollout: Rollout, path: str | Path) -> None:
    """Writes a rollout: a line with the settings, then a line for each reply."""
    head = {"format": FORMAT, **dataclasses.asdict(rollout.settings)}
    lines = [head, *(dataclasses.asdict(r) for r in rollout.replies)]
    text = "\n".join(json.dumps(line) for line in lines)
    Path(path).write_text(text + "\n", encoding="utf-8")


def parsed(lines: list[Any], where: str) -> Rollout:
    """Returns the rollout of a file's lines, read as JSON. Raises RolloutError."""
    head = dict(lines[0])
    if head.pop("format", None) != FORMAT:
        raise RolloutError(f"{where}: not a rollout of a known kind; docs/rollout.md lists them")
    known = [f.name for f in dataclasses.fields(Settings)]
    if strange := [k for k in head if k not in known]:
        raise RolloutError(f"{where}, line 1: {unknown('setting', strange[0], known)}")
    try:
        settings = Settings(**head)
    except (ConfigError, TypeError) as error:
        raise RolloutError(f"{where}, line 1: {error}") from None
    return Rollout(settings, tuple(_replies(lines[1:], where)), where)


def stated(rollout: Rollout, assignments: Sequence[str]) -> Rollout:
    """Returns the rollout with settings of the form `temperature=0.7`, for files that hold none.
    Raises ConfigError."""
    known = [field.name for field in dataclasses.fields(Settings)]
    values: dict[str, Any] = {}
    for item in assignments:
        name, _, raw = item.partition("=")
        if name not in known:
            raise ConfigError(unknown("setting", name, known))
        try:
            values[name] = raw if TYPES.get(name) is str else json.loads(raw)
        except ValueError:
            values[name] = raw
    try:
        settings = dataclasses.replace(rollout.settings, **values)
    except TypeError as error:
        raise ConfigError(f"settings: {error}; write numbers as temperature=0.7") from None
    return dataclasses.replace(rollout, settings=settings)


def _replies(lines: list[Any], where: str) -> Iterator[Reply]:
    known = {f.name for f in dataclasses.fields(Reply)}
    for number, line in enumerate(lines, 2):
        place = f"{where}, line {number}"
        if not isinstance(line, dict) or not {"prompt", "tokens", "logprobs"} <= set(line) <= known:
            raise RolloutError(
                f"{place}: not a reply; its keys are prompt, tokens, logprobs, and may be step, "
                "cached"
            )
        with well_formed(place):
            found = reply(place, **line)
        yield found


@contextmanager
def well_formed(place: str) -> Iterator[None]:
    """Raises RolloutError where fields of a file are of other types than its kind has."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise RolloutError(
            f"{place}: malformed fields ({in_one_line(error)}); docs/rollout.md says what is read"
        ) from None


def reply(
    where: str,
    prompt: Any,
    tokens: Any,
    logprobs: Any,
    step: int = 0,
    cached: int = 0,
) -> Reply:
    """Returns a reply whose values were checked. Raises RolloutError with the place."""
    ids = [*prompt, *tokens]
    if strange := [t for t in ids if not isinstance(t, int) or isinstance(t, bool) or t < 0]:
        raise RolloutError(f"{where}: {strange[0]!r} is no token id; give the ids, not the text")
    for i, x in enumerate(logprobs):
        if not isinstance(x, int | float) or not math.isfinite(x) or x > 1e-3:
            raise RolloutError(
                f"{where}: log probability {i} is {x!r}; it must be a finite number up to 0"
            )
    try:
        return Reply(tuple(prompt), tuple(tokens), tuple(map(float, logprobs)), step, cached)
    except RolloutError as error:
        raise RolloutError(f"{where}: {error}") from None


def require_same(a: Rollout, b: Rollout) -> None:
    """Raises a RolloutError that names the first difference between what two rollouts are of."""
    names = (a.name or "A", b.name or "B")
    for field in MUST_AGREE:
        own, other = getattr(a.settings, field), getattr(b.settings, field)
        is_known = "" not in (own, other) and None not in (own, other)
        if is_known and own != other:
            raise _mismatch(names, f"{field} is {own!r} and {other!r}")
    if len(a.replies) != len(b.replies):
        raise _mismatch(names, f"{len(a.replies)} and {len(b.replies)} replies")
    for number, (x, y) in enumerate(zip(a.replies, b.replies, strict=True)):
        for field in ("prompt", "tokens"):
            own, other = getattr(x, field), getattr(y, field)
            if own != other:
                raise _mismatch(names, f"reply {number}: {_difference(field, own, other)}")
        if x.step != y.step:
            raise _mismatch(names, f"reply {number}: step {x.step} and {y.step}")


def _difference(field: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if place is None:
        return f"{field} of {len(a)} and {len(b)} tokens"
    return f"token {place} of {field} is {a[place]} and {b[place]}"


def _mismatch(names: tuple[str, str], fact: str) -> RolloutError:
    return RolloutError(
        f"{names[0]} and {names[1]} do not match: {fact}; record both for the same tokens and "
        "settings"
    )
