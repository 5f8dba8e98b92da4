"""Chat templates: which one a checkpoint uses, and how messages become token ids by it.

A template renders the real conversation, as in transformers. What the messages spell stays text all
the same: a second rendering hides their special tokens, and must else be equal to the first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from glm_core.errors import PromptError
from glm_core.pretrained import sandbox
from glm_core.pretrained.tokenizers import (
    CONFIG,
    ChatGLM2Tokenizer,
    ChatTokenizer,
    FastTokenizer,
    read_json,
)

GLM4 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""roles as special tokens, each message after a newline (GLM-4's tokenization_chatglm.py,
build_single_message)"""
CHATGLM3 = GLM4.replace("|>\n", "|>\n ")
"""GLM-4's template with a blank before each message (ChatGLM3's tokenizer_config.json): its code
encodes each message alone, and sentencepiece puts a blank before each text that it encodes"""
CHATGLM2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n"
    "问：{{ m.content }}\n\n答：{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)
"""numbered rounds as plain text (ChatGLM2's tokenization_chatglm.py, build_prompt)"""
CONSTANTS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""special tokens that a template can name: bos_token, eos_token, ..."""
SPECIAL_TOKENS = "special_tokens_map.json"
"""where transformers before 4.34 kept what tokenizer_config.json holds since"""
PRIVATE = range(0xF0000, 0xFFFFE)
"""code points without a meaning, which stand for hidden text"""
Tool = Mapping[str, Any]
"""a function that a reply may call, as in OpenAI's `tools`"""
Thought = Literal["none", "possible", "opened"]
OPENING, CLOSING = "<think>", "</think>"
"""tags around a thought"""
MESSAGE_TOOLS = re.compile(r"""\[['"]tools['"]\]|\.tools\b""")
"""how a template reads tools from a message (GLM-4-9b-chat)"""
THINKING = re.compile(r"<\w+>")
"""a tag that opens a thought, such as <think>"""
OTHER_TEMPLATE = "put another template in the checkpoint's folder (chat_template.jinja)"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user, assistant, or observation: what a tool returned"""
    content: str
    metadata: str = ""
    """the tool that an assistant's message calls; its content is then the arguments as JSON"""

    @property
    def values(self) -> dict[str, str]:
        """What a template sees."""
        values = {"role": self.role, "content": self.content}
        return {**values, "metadata": self.metadata} if self.metadata else values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A checkpoint's chat template."""

    source: str
    """Jinja source"""
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """names of special tokens that the template may use, such as bos_token"""
    prefix: tuple[int, ...] = ()
    """ids before the rendered text; a checkpoint's own template spells them itself"""

    def thought(self, tokenizer: ChatTokenizer) -> Thought:
        """Returns whether replies may begin with a thought, and whether requests open it."""
        if CLOSING not in self.source:
            return "none"
        ask = [Message("user", "a")]
        request = Conversation(self, ask, tokenizer).render(ask, add_generation_prompt=True)
        return "opened" if request.rstrip().endswith(OPENING) else "possible"

    @property
    def prints_date(self) -> bool:
        """Whether the rendered text depends on the day."""
        return "strftime_now" in self.source

    def prompt_ids(
        self, messages: Sequence[Message], tokenizer: ChatTokenizer, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Returns the ids of the prompt that asks for a reply; special tokens that messages spell
        stay text. tools: functions that the reply may call. Raises PromptError."""
        conversation = Conversation(self, messages, tokenizer, tools)
        text = conversation.render(messages, add_generation_prompt=True)
        return [*self.prefix, *conversation.encode(text)]

    def reply_ids(self, messages: Sequence[Message], tokenizer: ChatTokenizer) -> list[int]:
        """Returns the ids that follow `prompt_ids(messages[:-1])` up to the end of the last
        message's content. Raises PromptError where the template does not show them."""
        conversation = Conversation(self, messages, tokenizer)
        return conversation.encode(conversation.reply())


def find_template(folder: Path, tokenizer: ChatTokenizer) -> ChatTemplate:
    """Returns the template of chat_template.jinja, else that of tokenizer_config.json, else the
    published template that the special tokens imply."""
    config = read_json(folder / CONFIG)
    older = {} if "added_tokens_decoder" in config else read_json(folder / SPECIAL_TOKENS)
    constants = _constants({**config, **older})
    if (file := folder / "chat_template.jinja").is_file():
        return ChatTemplate(source=file.read_text(encoding="utf-8"), constants=constants)
    configured = config.get("chat_template")
    if isinstance(configured, list):  # several, by name
        configured = next((t["template"] for t in configured if t.get("name") == "default"), None)
    if configured:
        return ChatTemplate(source=str(configured), constants=constants)
    source = CHATGLM2
    if "<|user|>" in tokenizer.special:
        source = CHATGLM3 if isinstance(tokenizer, ChatGLM2Tokenizer) else GLM4
    return ChatTemplate(source=source, constants=constants, prefix=tuple(tokenizer.prefix))


def _constants(config: Mapping[str, object]) -> dict[str, str]:
    """Returns the special tokens of a config by name; each is a string or an added token."""
    found = {f"{name}_token": config.get(f"{name}_token") for name in CONSTANTS}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


class Conversation:
    """Messages that a template renders, with the special tokens that they spell hidden."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tokenizer: ChatTokenizer,
        tools: Sequence[Tool] = (),
    ) -> None:
        self._template, self._messages, self._tokenizer = template, messages, tokenizer
        self._tools = tools
        needed = {"tools": bool(tools), "metadata": any(m.metadata for m in messages)}
        for name, is_needed in needed.items():
            if is_needed and not re.search(rf"\b{name}\b", template.source):
                raise PromptError(f"tools: the model's chat template knows no {name}; leave it out")
        text = "\0".join(m.content for m in messages)
        unused = (c for c in map(chr, PRIVATE) if c not in text)
        self._mark = next(unused)
        self._hidden = {n: next(unused) for n in _longest_first(tokenizer.special) if n in text}
        """the special tokens that messages spell, each with the character that stands for it"""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Returns the rendered messages with hidden special tokens. Raises PromptError where the
        template treats a hidden token otherwise than the token itself."""
        real = self._render(messages, add_generation_prompt)
        if not self._hidden:
            return real
        hidden = [m._replace(content=self._hide(m.content)) for m in messages]
        text = self._render(hidden, add_generation_prompt)
        if self._reveal(text) != real:
            raise PromptError(
                f"chat template: it changes a special token that a message spells "
                f"({', '.join(self._hidden)}), which cannot be told from its own; take the token "
                "out of the message"
            )
        return text

    def reply(self) -> str:
        """Returns what is rendered between the request and the end of the last message's content,
        with hidden special tokens. Raises PromptError where that cannot be told."""
        *past, last = self._messages
        request = self.render(past, add_generation_prompt=True)
        whole = self.render(self._messages, add_generation_prompt=False)
        content = last.content
        if self._with_reply(content.rstrip()) == whole:
            content = content.rstrip()
        before, _, after = self._with_reply(content + self._mark).partition(self._mark)
        if before + after != whole or self._mark in after:
            raise PromptError(
                "chat template: it does not print the last message as it is, so the reply cannot "
                f"be located; {OTHER_TEMPLATE}"
            )
        if before.startswith(request):
            return before.removeprefix(request)
        return self._opened_reply(request, content)

    def _opened_reply(self, request: str, content: str) -> str:
        """Returns the rest of a reply whose first words the request spells already, such as
        `<think>`, which the template leaves out of past replies. A reply without a thought gets an
        empty one."""
        head, _, _ = self._with_reply(self._mark).partition(self._mark)
        opening = request.removeprefix(head)
        word = opening.strip()
        if request.startswith(head) and word and content.lstrip().startswith(word):
            rest = content.lstrip().removeprefix(word)
            return self._hide(rest if opening.endswith(word) else rest.lstrip())
        closing = word.replace("<", "</")
        if not (THINKING.fullmatch(word) and closing in self._template.source):
            raise PromptError(
                f"chat template: the request ends in {opening[-40:]!r}, which the reply does not "
                f"continue; begin the reply with it, or {OTHER_TEMPLATE}"
            )
        if closing in content:  # as the model writes it: the request has opened the thought
            return self._hide(content)
        return self._hide(f"{'' if opening.endswith(chr(10)) else chr(10)}\n{closing}\n\n{content}")

    def _with_reply(self, content: str) -> str:
        messages = [*self._messages[:-1], self._messages[-1]._replace(content=content)]
        return self.render(messages, add_generation_prompt=False)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a rendered text. Text between two special tokens, contents included,
        is encoded as one."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, FastTokenizer) and not self._hidden:
            return tokenizer.encode_with_special(text)
        special, ids = tokenizer.special, list[int]()
        names = "|".join(map(re.escape, _longest_first(special)))
        for part in re.split(f"({names})", text) if names else [text]:
            if part in special:
                ids.append(special[part])
            elif part:
                ids += tokenizer.encode(self._reveal(part))
        return ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        shown: list[dict[str, Any]] = [dict(m.values) for m in messages]
        tools = [dict(tool) for tool in self._tools] or None
        if tools and MESSAGE_TOOLS.search(self._template.source):
            shown.insert(0, {"role": "system", "content": "", "tools": tools})
        values = {
            **self._template.constants,
            "messages": shown,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return sandbox.render(self._template.source, values)

    def _hide(self, text: str) -> str:
        """Returns a text of the same length, so that a template that measures it sees the same."""
        for name, character in self._hidden.items():
            text = text.replace(name, character * len(name))
        return text

    def _reveal(self, text: str) -> str:
        for name, character in self._hidden.items():
            text = text.replace(character * len(name), name)
        return text


def _longest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=len, reverse=True)
