"""What requests may say: OpenAI's completions and chat, and ChatGLM-6B's own api.py.

A field that would change the answer and is not listed here is refused, never ignored."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glm_core.errors import ConfigError
from glm_core.model.sample import Sampling


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """OpenAI's stream_options."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Shared(Strict):
    """Fields of both of OpenAI's endpoints."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """our own; 0 = all"""
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
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, wanted: int | None, most: int, end: tuple[int, ...]) -> Sampling:
        """How the answer is drawn. Raises ConfigError where more than `most` tokens are wanted."""
        if wanted is not None and wanted > most:
            raise ConfigError(
                f"max_tokens={wanted}: this server gives {most} at most; ask for fewer"
            )
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(
            max_tokens=wanted or most,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            stop=end,
        )


class Completion(Shared):
    """POST /v1/completions."""

    prompt: str
    max_tokens: int | None = Field(default=16, ge=1)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    logprobs: None = None
    suffix: None = None


class TextPart(Strict):
    """A part of a message's content; only text."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content's text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(Shared):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None


class Legacy(Strict):
    """POST / as ChatGLM-6B's api.py takes it; its defaults."""

    prompt: str
    history: list[tuple[str, str]] = []
    max_length: int = Field(default=2048, ge=1)
    """tokens of question and answer together"""
    top_p: float = Field(default=0.7, gt=0, le=1)
    temperature: float = Field(default=0.95, ge=0, le=2)
