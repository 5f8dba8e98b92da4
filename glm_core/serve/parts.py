"""Parts of a reply: what the model thought, what it says, and the tool that it calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from typing import Literal, NamedTuple

from glm_core.pretrained.templates import CLOSING, OPENING, Thought


class Call(NamedTuple):
    """A call of a tool."""

    id: str
    name: str
    arguments: str
    """a JSON object"""


class Parts(NamedTuple):
    """What a piece of a reply adds."""

    reasoning: str = ""
    content: str = ""
    call: Call | None = None


class Tools(NamedTuple):
    """What a reply may call."""

    names: Collection[str] = ()
    choice: Literal["none", "auto", "required", "function"] = "auto"
    """`required`: any of them must be called; `function`: the one that is named"""

    @property
    def must_call(self) -> bool:
        """Whether the reply must be a call."""
        return self.choice in ("required", "function")


NO_TOOLS = Tools()


def parse_call(text: str, tools: Tools) -> Call | None:
    """Returns the call that a reply consists of, None if it is none. In GLM-4's format a reply is a
    tool's name, a newline and its arguments as JSON (tokenization_chatglm.py). Where the reply must
    be a call, one that max_tokens cuts is a call with a part of its arguments."""
    name, line_end, arguments = text.strip().partition("\n")
    if name.strip() not in tools.names or (tools.must_call and not line_end):
        return None
    try:
        is_object = tools.must_call or isinstance(json.loads(arguments), dict)
    except ValueError:
        return None
    return (
        Call(f"call_{uuid.uuid4().hex[:24]}", name.strip(), arguments.strip())
        if is_object
        else None
    )


class Splitter:
    """Splits the text of one reply as it comes. Text that may still become a tag or a call is held
    back."""

    def __init__(self, thought: Thought, tools: Tools = NO_TOOLS) -> None:
        """thought: see ChatModel.thought."""
        self._phase = {"none": "answer", "possible": "start", "opened": "thought"}[thought]
        self._tools, self._held, self._thinking = tools, "", False

    def feed(self, text: str, last: bool = False) -> Parts:
        """Returns what is decided by this text; with `last`, all that is left."""
        self._held += text
        if self._phase == "start":
            self._begin(last)
        reasoning = self._reasoning(last) if self._phase == "thought" else ""
        if self._phase == "after":
            self._held = self._held.lstrip("\n")
            self._phase = "answer" if self._held or last else "after"
        if self._phase != "answer" or (self._tools.names and not last and self._may_call()):
            return Parts(reasoning)
        if self._tools.names and (call := parse_call(self._held, self._tools)):
            return Parts(reasoning, call=call)
        content, self._held, self._tools = self._held, "", NO_TOOLS
        return Parts(reasoning, content)

    def _may_call(self) -> bool:
        """Whether the reply can still become a call."""
        name, line_ends, _ = self._held.lstrip().partition("\n")
        if line_ends:
            return name.strip() in self._tools.names
        return any(tool.startswith(name.strip()) for tool in self._tools.names)

    def _begin(self, last: bool) -> None:
        """Decides whether the reply begins with a thought, as soon as that can be told."""
        begin = self._held.lstrip()
        if begin.startswith(OPENING):
            self._phase, self._held = "thought", begin.removeprefix(OPENING)
        elif last or not OPENING.startswith(begin):
            self._phase = "answer"

    def _reasoning(self, last: bool) -> str:
        """Returns the next part of the thought, without line ends around the whole."""
        if not self._thinking:
            self._held = self._held.lstrip("\n")
            self._thinking = bool(self._held)
        thought, closing, rest = self._held.partition(CLOSING)
        if closing or last:
            self._phase, self._held = "after", rest
            return thought.rstrip("\n")
        sure = thought[: len(thought) - _overlap(thought, CLOSING)].rstrip("\n")
        self._held = thought.removeprefix(sure)
        return sure


def _overlap(text: str, tag: str) -> int:
    """Returns how many characters at the end of `text` may begin the tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
