"""Chat templates: which one a checkpoint uses, and how messages become token ids by it.

A template is rendered with a placeholder for the content of each message. So the special tokens of
a prompt are those that the template spells, never those that a message spells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.sandbox

from glm_core.errors import PromptError
from glm_core.pretrained.tokenizers import CONFIG, ChatGLM2Tokenizer, ChatTokenizer, read_json

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
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


def find_template(folder: Path, tokenizer: ChatTokenizer) -> str:
    """Returns the text of chat_template.jinja, else the template of tokenizer_config.json, else the
    published template that the special tokens imply."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    configured = read_json(folder / CONFIG).get("chat_template")
    if isinstance(configured, list):  # several, by name
        configured = next((t["template"] for t in configured if t.get("name") == "default"), None)
    if configured:
        return str(configured)
    if "<|user|>" not in tokenizer.special:
        return CHATGLM2
    return CHATGLM3 if isinstance(tokenizer, ChatGLM2Tokenizer) else GLM4


def placeholder(index: int) -> str:
    """Returns what stands for the content of message `index` in a rendered template."""
    return f"\ue000{index}\ue001"


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Returns the template rendered with placeholders. The template is foreign: it runs in jinja2's
    sandbox. Raises PromptError where it is broken, reaches out of the sandbox or refuses these
    messages."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    del environment.filters["attr"]  # leads out of the sandbox before 3.1.6 (CVE-2025-27516)
    values = [{"role": m.role, "content": placeholder(i)} for i, m in enumerate(messages)]
    try:
        return environment.from_string(template).render(
            messages=values, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise PromptError(f"chat template: {error}; give other roles or order") from None
    except Exception as error:  # whatever Python's operators raise
        raise PromptError(
            f"chat template: {type(error).__name__}: {error}; use the checkpoint's own template"
        ) from None


def encode_rendered(
    rendered: str, messages: Sequence[Message], tokenizer: ChatTokenizer
) -> list[int]:
    """Returns the token ids of a rendered template. Text between two special tokens, contents
    included, is encoded as one."""
    special = tokenizer.special
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    ids: list[int] = []
    for part in re.split(f"({names})", rendered) if names else [rendered]:
        if part in special:
            ids.append(special[part])
        elif part:
            text = PLACEHOLDER.sub(lambda match: messages[int(match[1])].content, part)
            ids += tokenizer.encode(text)
    return ids
