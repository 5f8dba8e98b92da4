"""Schemas of requests: OpenAI's completions and chat, and ChatGLM-6B's own api.py.

A field that is not listed here is refused by its name, never ignored. A null is an absent field."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glm_core.errors import ConfigError, unknown
from glm_core.model.sample import Sampling
from glm_core.pretrained.chat_model import ChatModel
from glm_core.pretrained.templates import Message
from glm_core.serve.grammar import Wanted
from glm_core.serve.neutral import NEUTRAL, Strict, plain_message, without_neutral

ROLES = {"developer": "system", "tool": "observation"}
"""OpenAI's roles to those of chat templates, where they differ"""
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""fields whose default is the model's own"""


class StreamOptions(Strict):
    """OpenAI's stream_options."""

    include_usage: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(Strict):
    """Fields common to OpenAI's completions and chat."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    """of this and the following the default is the model's own (generation_config.json), else
    OpenAI's"""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    """here and below: additions of vLLM and others; 0 = all tokens"""
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(default=1, ge=1, le=128)
    stop_token_ids: list[int] = []
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
        neutral = {k: v for k, v in NEUTRAL.items() if k not in cls.model_fields}
        body = without_neutral(body, neutral, "", refused)
        if isinstance(messages := body.get("messages"), list):
            body["messages"] = [
                plain_message(m, f"messages.{i}.", refused) for i, m in enumerate(messages)
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

    @property
    def reported(self) -> int | None:
        """How many likely tokens are reported beside each token; None: no report."""
        return None

    def sampling(
        self, max_tokens: int | None, limit: int, model: ChatModel, index: int
    ) -> Sampling:
        """Returns the sampling settings of reply number `index`; max_tokens None means `limit`.
        Raises ConfigError if `max_tokens` is larger than `limit`, or for ids that are no tokens."""
        if max_tokens is not None and max_tokens > limit:
            raise ConfigError(
                f"max_tokens={max_tokens}: this server gives {limit} at most; ask for fewer"
            )
        vocab = model.tokenizer.vocab
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if odd := [i for i in ids if not 0 <= i < vocab]:
                raise ConfigError(f"{name}: {odd[0]} is no token; allowed are 0 ... {vocab - 1}")
        chosen = {k: v for k in RECOMMENDED if (v := getattr(self, k)) is not None}
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(
            max_tokens=max_tokens or limit,
            seed=(seed + index) % (1 << 63),
            stop=(*model.stop, *self.stop_token_ids),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            logprobs=self.reported,
            **{**model.sampling, **chosen},
        )


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: str
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def reported(self) -> int | None:
        """How many likely tokens are reported beside each token; None: no report."""
        return self.logprobs

    @model_validator(mode="before")
    @classmethod
    def _one_prompt(cls, body: Any) -> Any:
        """Returns the body with a list of one text as that text. Raises ConfigError for more."""
        if isinstance(body, dict) and body.get("logprobs") is False:  # as the chat endpoint's
            body = {k: v for k, v in body.items() if k != "logprobs"}
        if isinstance(body, dict) and isinstance(prompt := body.get("prompt"), list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ConfigError("prompt: one text is supported here; send each text alone")
            return {**body, "prompt": prompt[0]}
        return body


class TextPart(Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The schema of the arguments, which are an object. Raises ConfigError for another type."""
        schema = {"type": "object", **(self.parameters or {})}
        if schema["type"] != "object":
            raise ConfigError(
                f"tools.{self.name}.parameters.type: must be 'object'; received {schema['type']!r}"
            )
        return schema


class OfferedTool(Strict):
    """OpenAI's tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """OpenAI's tool_choice; a word alone is its type."""

    type: Literal["none", "auto", "required", "function"] = "auto"
    function: NamedFunction | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, body: Any) -> Any:
        return {"type": body} if isinstance(body, str) else body


class CalledFunction(Strict):
    """A function with its arguments."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier reply made."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    tool_calls: list[ToolCall] = []

    @model_validator(mode="before")
    @classmethod
    def _content_or_calls(cls, body: Any) -> Any:
        """Returns the body with empty content where there are calls instead."""
        if isinstance(body, dict) and body.get("tool_calls") and body.get("content") is None:
            return {**body, "content": ""}
        return body

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @property
    def messages(self) -> list[Message]:
        """The message as chat templates take it: each call is a message of its own."""
        calls = [
            Message("assistant", c.function.arguments, c.function.name) for c in self.tool_calls
        ]
        role = ROLES.get(self.role, self.role)
        return [*([Message(role, self.text)] if self.text or not calls else []), *calls]


class JsonSchema(Strict):
    """OpenAI's json_schema: `strict` is always so here."""

    name: str
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        """The JSON schema of the reply; None: any text. Raises ConfigError if it is missing."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ConfigError("response_format.json_schema: missing; give it")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)

    @property
    def conversation(self) -> list[Message]:
        """The messages as chat templates take them."""
        return [message for item in self.messages for message in item.messages]

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows, as chat templates take them."""
        offered = [] if self.tool_choice.type == "none" else self.tools
        hidden = {"function": {"strict"}}
        return [tool.model_dump(exclude_none=True, exclude=hidden) for tool in offered]

    @property
    def callable_tools(self) -> list[Function]:
        """The functions that the reply may call. Raises ConfigError for a choice among none."""
        offered = {tool.function.name: tool.function for tool in self.tools}
        choice, names = self.tool_choice, list(offered)
        if choice.type == "none":
            return []
        if choice.type == "function":
            if choice.function is None:
                raise ConfigError("tool_choice.function: missing; give its name")
            if choice.function.name not in offered:
                fact = unknown("function", choice.function.name, names)
                raise ConfigError(f"tool_choice: {fact}")
            return [offered[choice.function.name]]
        if choice.type == "required" and not offered:
            raise ConfigError("tool_choice: required needs tools; give some, or leave it out")
        return list(offered.values())

    @property
    def must_call(self) -> bool:
        """Whether the reply must be a call."""
        return self.tool_choice.type in ("required", "function")

    @property
    def wanted(self) -> Wanted:
        """What the reply may be. Where it need not be a call, the arguments of a function that is
        not `strict` are free."""
        schema, calls = self.response_format.schema_of_reply, {}
        for function in self.callable_tools:
            if function.strict or self.must_call:
                calls[function.name] = function.arguments_schema
            elif schema is not None:
                calls[function.name] = {"type": "object"}
        return Wanted(schema, calls, self.must_call)

    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[OfferedTool] = []
    tool_choice: ToolChoice = ToolChoice()
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @property
    def reported(self) -> int | None:
        """How many likely tokens are reported beside each token; None: no report."""
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs: needs logprobs; add logprobs=true")
        return self.top_logprobs if self.logprobs else None


class LegacyRequest(Strict):
    """POST /, with the fields and defaults of ChatGLM-6B's api.py."""

    prompt: str
    history: list[tuple[str, str]] = []
    max_length: int = Field(default=2048, ge=1)
    """tokens of prompt and reply together"""
    top_p: float = Field(default=0.7, gt=0, le=1)
    temperature: float = Field(default=0.95, ge=0, le=2)
