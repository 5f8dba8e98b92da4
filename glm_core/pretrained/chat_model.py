"""A model with its tokenizer and chat format: what generation, fine-tuning and the server use."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm_core.errors import PromptError
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, blank, causal, encode, part_a
from glm_core.pretrained.templates import ChatTemplate, Message, Thought, Tool
from glm_core.pretrained.tokenizers import BlankTokenizer, ChatTokenizer, TextTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatModel(abc.ABC):
    """A model with its tokenizer and chat format."""

    model: GLM
    tokenizer: TextTokenizer
    name: str
    stop: tuple[int, ...]
    """ids of the tokens that end a reply"""
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """fields of Sampling that the model's authors recommend (generation_config.json)"""
    files: tuple[Path, ...] = ()
    """the tokenizer and chat template on disk, copied wherever the model is written"""

    @abc.abstractmethod
    def completion_prompt(self, text: str) -> Prompt:
        """Returns the prompt that continues `text`. Raises PromptError for an empty text."""

    @abc.abstractmethod
    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """Returns the prompt that asks for a reply to the last message. Content that spells a
        special token stays text. tools: functions that the reply may call. Raises PromptError
        unless the last message is the user's or a tool's, and for tools without a template."""

    @property
    def thought(self) -> Thought:
        """Whether replies may begin with a thought, and whether the prompt opens it."""
        return "none"

    @abc.abstractmethod
    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of the last message as the model would generate them after
        `chat_prompt(messages[:-1])`, without the token that stops it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankFillingModel(ChatModel):
    """A model that fills blanks (GLM, GLM-130B, ChatGLM-6B); it chats in ChatGLM-6B's rounds."""

    tokenizer: BlankTokenizer

    def completion_prompt(self, text: str) -> Prompt:
        """Returns the prompt that fills the first blank of `text`, or continues a text without a
        blank. Raises PromptError for an empty text."""
        _require_text(text)
        a = part_a(encode(text, self.tokenizer), self.tokenizer)
        return blank(a, self.tokenizer, self.model.config.positions)

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """Returns ChatGLM-6B's rounds (its modeling_chatglm.py, chat), after the text of all system
        messages. Raises PromptError unless the last message is the user's, and for tools."""
        if tools or any(m.role == "observation" or m.metadata for m in messages):
            raise PromptError("tools: this model has no chat template with tools; leave them out")
        _require_question(messages)
        system = "".join(m.content + "\n" for m in messages if m.role == "system")
        *past, last = [m for m in messages if m.role != "system"]
        history, rounds = "", 0
        for message in past:
            if message.role == "user":
                history += f"[Round {rounds}]\n问：{message.content}\n"
            else:
                history, rounds = history + f"答：{message.content}\n", rounds + 1
        question = f"[Round {rounds}]\n问：{last.content}\n答：" if past else last.content
        a = part_a(self.tokenizer.encode(system + history + question), self.tokenizer)
        return blank(a, self.tokenizer, self.model.config.positions)

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of the last message."""
        return self.tokenizer.encode(messages[-1].content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalModel(ChatModel):
    """A model that continues text (ChatGLM2 and later); it chats by a template."""

    tokenizer: ChatTokenizer
    template: ChatTemplate

    def completion_prompt(self, text: str) -> Prompt:
        """Returns the text between the tokenizer's prefix and suffix. Raises PromptError for an
        empty text."""
        _require_text(text)
        tokenizer = self.tokenizer
        return causal([*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix])

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """Returns the rendered template. Raises PromptError unless the last message is the user's
        or a tool's, and where the template refuses messages or tools."""
        _require_question(messages)
        return causal(self.template.prompt_ids(messages, self.tokenizer, tools))

    @functools.cached_property
    def thought(self) -> Thought:
        """Whether replies may begin with a thought, and whether the prompt opens it."""
        return self.template.thought(self.tokenizer)

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of the last message, and before them those of what the template
        puts between the request and the reply, such as a newline. Raises PromptError where the
        template does not show them."""
        return self.template.reply_ids(messages, self.tokenizer)


def _require_text(text: str) -> None:
    if not text:
        raise PromptError("prompt: is empty; write a text to continue")


def _require_question(messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role not in ("user", "observation"):
        raise PromptError("messages: the last one must be the user's or a tool's; add a question")
