"""Conversations in a file, as a model is to answer them: what fine-tuning learns from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm_core.errors import DataError
from glm_core.pretrained.pairs import Pair
from glm_core.pretrained.source import Message, Source

FORMS = (
    'expected {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, '
    "...]} that ends with the assistant's"
)


def read(source: Source, file: str | Path) -> list[Pair]:
    """A line of JSON for each conversation; its last answer is what is learnt, after the words that
    `source` puts before it. Raises DataError, PromptError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a JSONL file in UTF-8") from None
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    return [_pair(source, _messages(f"{file}:{n}", line)) for n, line in numbered]


def _pair(source: Source, messages: list[Message]) -> Pair:
    return Pair(source.chat(messages[:-1]), (*source.answer(messages), source.stop[0]))


def _messages(place: str, line: str) -> list[Message]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}); {FORMS}") from None
    match value:
        case {"prompt": str(prompt), "response": str(response)}:
            return [Message("user", prompt), Message("assistant", response)]
        case {"messages": [*items]}:
            found = [Message(i["role"], i["content"]) for i in items if _said(i)]
            if len(found) == len(items) > 1 and found[-1].role == "assistant":
                return found
    raise DataError(f"{place}: not a conversation; {FORMS}")


def _said(item: Any) -> bool:
    match item:
        case {"role": "system" | "user" | "assistant", "content": str()}:
            return True
    return False
