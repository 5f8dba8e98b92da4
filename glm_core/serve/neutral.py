"""Fields of OpenAI's requests that are not supported: values that ask for nothing are taken, all
others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_content",
    "safety_identifier",
    "tool_call_id",
    "user",
}
"""fields that say who asks and what to cache, or what a past reply thought; they change no
reply"""
Neutral = Mapping[str, tuple[Any, ...]]
"""fields of OpenAI's that are not supported, each with the values that ask for nothing"""
NEUTRAL: Neutral = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_IN_MESSAGE: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
}
"""what a reply carries that a client appends to its messages"""


class Strict(BaseModel):
    """A schema that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None}


def without_neutral(
    body: dict[str, Any], neutral: Neutral, place: str, refused: list[str]
) -> dict[str, Any]:
    """Returns the fields that ask for something and are not in `neutral`; those that are in it go
    to `refused`, with `place` before their name."""
    kept = {}
    for key, value in body.items():
        if value is None or key in IGNORED:
            continue
        if key not in neutral:
            kept[key] = value
        elif not any(_same(value, item) for item in neutral[key]):
            refused.append(place + _named(key, value))
    return kept


def plain_message(message: Any, place: str, refused: list[str]) -> Any:
    """Returns a message without what a reply carries beside its text."""
    if not isinstance(message, dict):
        return message
    message = without_neutral(message, NEUTRAL_IN_MESSAGE, place, refused)
    if message.get("role") == "function":
        refused.append(f"{place}role=function")
    if isinstance(parts := message.get("content"), list):
        kinds = [(i, p["type"]) for i, p in enumerate(parts) if isinstance(p, dict) and "type" in p]
        refused += [f"{place}content.{i}.type={kind}" for i, kind in kinds if kind != "text"]
    return message


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; 0 is not false."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _named(key: str, value: Any) -> str:
    """Returns the field's name, with its value where that is short."""
    text = "" if isinstance(value, list | dict) else json.dumps(value)
    return f"{key}={text}" if 0 < len(text) < 40 else key
