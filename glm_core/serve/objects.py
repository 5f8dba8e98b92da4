"""OpenAI's JSON objects: what a reply looks like at each endpoint, whole or streamed."""

from __future__ import annotations

import abc
import collections
import time
import uuid
from collections.abc import Sequence
from typing import Any

from glm_core.model.sample import TokenLogprob
from glm_core.pretrained.templates import Thought
from glm_core.pretrained.tokenizers import TextTokenizer
from glm_core.serve.parts import Call, Parts, Splitter, Tools
from glm_core.serve.reply import Chunk

Json = dict[str, Any]
CUT = "\ufffd"
"""what a part of a character decodes to"""


def head(prefix: str, kind: str, model: str) -> Json:
    """Returns the fields that all JSON objects of one request begin with."""
    created = int(time.time())
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": created,
        "model": model,
    }


def usage(prompt: tuple[int, int], completion: int) -> Json:
    """Returns the numbers of tokens. prompt: all of the prompt, and those that were in the
    cache."""
    total, cached = prompt
    return {
        "prompt_tokens": total,
        "completion_tokens": completion,
        "total_tokens": total + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Form(abc.ABC):
    """The choices of one endpoint."""

    def __init__(self, head: Json, tokenizer: TextTokenizer) -> None:
        self.head, self._tokenizer = head, tokenizer

    @abc.abstractmethod
    def whole(self, index: int, chunk: Chunk) -> Json:
        """Returns the choice of a complete reply."""

    @abc.abstractmethod
    def part(self, index: int, chunk: Chunk) -> Json | None:
        """Returns the choice of a streamed part, None where there is nothing to say yet."""

    def opening(self, index: int) -> Json | None:
        """Returns the choice that comes before a reply's first part, if there is one."""
        return None

    def text_of(self, token: int) -> str:
        """Returns the text of a token within others: alone, sentencepiece drops its blank."""
        once = self._tokenizer.decode([token])
        return self._tokenizer.decode([token, token])[len(once) :]


class Completion(Form):
    """/v1/completions."""

    def __init__(self, head: Json, tokenizer: TextTokenizer) -> None:
        super().__init__(head, tokenizer)
        self._offsets: dict[int, int] = {}
        """by reply, characters of the tokens that are reported already"""

    def whole(self, index: int, chunk: Chunk) -> Json:
        return {
            "index": index,
            "text": chunk.text,
            "logprobs": self._logprobs(index, chunk.logprobs),
            "finish_reason": chunk.finish_reason or None,
        }

    part = whole

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not tokens:
            return None
        texts, offset = [self.text_of(t.token) for t in tokens], self._offsets.get(index, 0)
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
        self._offsets[index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self.text_of(i): p for i, p in t.top} for t in tokens],
            "text_offset": offsets,
        }


class Chat(Form):
    """/v1/chat/completions. A thought and a tool call have fields of their own."""

    def __init__(
        self, head: Json, tokenizer: TextTokenizer, thought: Thought, tools: Tools
    ) -> None:
        """thought, tools: see Splitter."""
        super().__init__(head, tokenizer)
        self._named = tools.choice == "function"
        self._splitters = collections.defaultdict[int, Splitter](lambda: Splitter(thought, tools))

    def whole(self, index: int, chunk: Chunk) -> Json:
        parts = self._splitters[index].feed(chunk.text, last=True)
        message: Json = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.call:
            message |= {"content": None, "tool_calls": [_call(parts.call)]}
        return self._choice(index, "message", message, chunk, parts)

    def part(self, index: int, chunk: Chunk) -> Json | None:
        parts = self._splitters[index].feed(chunk.text, last=bool(chunk.finish_reason))
        if not (any(parts) or chunk.finish_reason or chunk.logprobs):
            return None
        delta: Json = {}
        if parts.content or not (parts.reasoning or parts.call):
            delta["content"] = parts.content
        if parts.reasoning:
            delta["reasoning_content"] = parts.reasoning
        if parts.call:
            delta["tool_calls"] = [{"index": 0, **_call(parts.call)}]
        return self._choice(index, "delta", delta, chunk, parts)

    def opening(self, index: int) -> Json:
        """Returns the choice that names the role."""
        delta = {"role": "assistant", "content": ""}
        return self._choice(index, "delta", delta, Chunk("", "", 0), Parts())

    def _choice(self, index: int, key: str, message: Json, chunk: Chunk, parts: Parts) -> Json:
        finish = chunk.finish_reason or None
        if parts.call and finish == "stop" and not self._named:  # OpenAI's: a named one is no news
            finish = "tool_calls"
        return {
            "index": index,
            key: message,
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not tokens:
            return None
        listed = [
            {**self._entry(t.token, t.logprob), "top_logprobs": [self._entry(*p) for p in t.top]}
            for t in tokens
        ]
        return {"content": listed, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self.text_of(token)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if CUT in text else list(text.encode()),
        }


def _call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
