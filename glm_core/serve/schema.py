"""Schemas of requests: OpenAI's completions and chat, and ChatGLM-6B's own api.py.

A field that is not listed here is refused by its name, never ignored. A null is an absent field."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glm_core.errors import ConfigError
from glm_core.model.sample import Sampling

IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}
"""fields that say who asks and what to cache; they change no reply"""
Neutral = Mapping[str, tuple[Any, ...]]
"""fields of OpenAI's that are not supported, each with the values that ask for nothing"""
NEUTRAL: Neutral = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
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
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
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


class StreamOptions(Strict):
    """OpenAI's stream_options."""

    include_usage: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(Strict):
    """Fields common to OpenAI's completions and chat."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """an addition of glm-core; 0 = all tokens"""
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: Any) -> Any:
        """Returns the body without neutral fields. Raises ConfigError that names all others of
        OpenAI's that are not supported."""
        if not isinstance(body, dict):
            return body
        refused: list[str] = []
        body = _without_neutral(body, NEUTRAL, "", refused)
        if isinstance(messages := body.get("messages"), list):
            body["messages"] = [
                _message(m, f"messages.{i}.", refused) for i, m in enumerate(messages)
            ]
        if refused:
            them = "it" if len(refused) == 1 else "them"
            raise ConfigError(f"{', '.join(refused)}: not supported here; leave {them} out")
        return body

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in stop if s]

    def sampling(self, max_tokens: int | None, limit: int, stop: tuple[int, ...]) -> Sampling:
        """Returns the request's sampling settings; max_tokens None means `limit`. Raises
        ConfigError if `max_tokens` is larger than `limit`."""
        if max_tokens is not None and max_tokens > limit:
            raise ConfigError(
                f"max_tokens={max_tokens}: this server gives {limit} at most; ask for fewer"
            )
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        return Sampling(
            max_tokens=max_tokens or limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            stop=stop,
        )


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: str
    max_tokens: int | None = Field(default=16, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_prompt(cls, body: Any) -> Any:
        """Returns the body with a list of one text as that text. Raises ConfigError for more."""
        if isinstance(body, dict) and isinstance(prompt := body.get("prompt"), list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ConfigError("prompt: one text is supported here; send each text alone")
            return {**body, "prompt": prompt[0]}
        return body


class TextPart(Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class LegacyRequest(Strict):
    """POST /, with the fields and defaults of ChatGLM-6B's api.py."""

    prompt: str
    history: list[tuple[str, str]] = []
    max_length: int = Field(default=2048, ge=1)
    """tokens of prompt and reply together"""
    top_p: float = Field(default=0.7, gt=0, le=1)
    temperature: float = Field(default=0.95, ge=0, le=2)


def _without_neutral(
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


def _message(message: Any, place: str, refused: list[str]) -> Any:
    """Returns a message without what a reply carries beside its text."""
    if not isinstance(message, dict):
        return message
    message = _without_neutral(message, NEUTRAL_IN_MESSAGE, place, refused)
    if (role := message.get("role")) in ("tool", "function"):
        refused.append(f"{place}role={role}")
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
