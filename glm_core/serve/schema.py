"""Schemas of requests: OpenAI's completions and chat, and ChatGLM-6B's own api.py.

A field that is not listed here is refused, never ignored."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glm_core.errors import ConfigError
from glm_core.model.sample import Sampling


class Strict(BaseModel):
    """A schema that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


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
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, max_tokens: int | None, limit: int, stop: tuple[int, ...]) -> Sampling:
        """Returns the request's sampling settings; max_tokens None means `limit`. Raises
        ConfigError if `max_tokens` is larger than `limit`."""
        if max_tokens is not None and max_tokens > limit:
            raise ConfigError(
                f"max_tokens={max_tokens}: this server gives {limit} at most; ask for fewer"
            )
        seed = secrets.randbits(63) if self.seed is None else self.seed
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
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    logprobs: None = None
    suffix: None = None


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
    logprobs: Literal[False] | None = None


class LegacyRequest(Strict):
    """POST /, with the fields and defaults of ChatGLM-6B's api.py."""

    prompt: str
    history: list[tuple[str, str]] = []
    max_length: int = Field(default=2048, ge=1)
    """tokens of prompt and reply together"""
    top_p: float = Field(default=0.7, gt=0, le=1)
    temperature: float = Field(default=0.95, ge=0, le=2)
