"""Replies in a form that the request gives: a grammar forbids every token after which no JSON of
the schema, or no call of a tool, can follow.

The grammar is llguidance's, an optional package; the tokenizer must have bytes for its tokens
(tokenizer.json, or GLM-4's tiktoken file)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.errors import ConfigError
from glm_core.pretrained.chat_model import ChatModel
from glm_core.pretrained.templates import CLOSING, OPENING, Thought
from glm_core.pretrained.tokenizers import FastTokenizer, GLM4Tokenizer

BLANKS = {"whitespace_pattern": r"[ \n\r\t]{1,20}"}
"""blanks between JSON's parts; without a limit a model can write them for ever"""
SPACE = r"[\s\x1c-\x1f]"
"""what str.strip takes away around a tool's name (parts.parse_call)"""
Json = dict[str, Any]
ANY = "/(?s:.*)/"
"""any text"""


class Wanted(NamedTuple):
    """What a reply may be."""

    json: Json | None
    """JSON of this schema; None: any text"""
    calls: Mapping[str, Json]
    """or a call of one of these tools, with arguments of these schemas"""
    must_call: bool
    """it must be a call"""

    @property
    def is_free(self) -> bool:
        """Whether any text will do."""
        return self.json is None and not self.calls

    @property
    def field(self) -> str:
        """The field of the request that asks for it."""
        if self.must_call:
            return "tool_choice"
        return "tools.function.strict" if self.json is None else "response_format"


class Grammar:
    """What one reply may still say."""

    def __init__(self, matcher: Any, end: int) -> None:
        """matcher: llguidance's LLMatcher. end: the token that ends the reply where the grammar
        gives up."""
        self._matcher, self._end = matcher, end

    def restrict(self, logits: Tensor) -> None:
        """Sets the logits [V] of forbidden tokens to minus infinity, in place."""
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        if self._matcher.is_error():
            allowed[self._end] = True
        else:
            mask = torch.frombuffer(
                bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
            )
            known = min(len(mask), len(allowed))
            allowed[:known] = mask[:known] > 0
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Goes on after this token."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes the constraints of one model's replies."""

    def __init__(self, chat_model: ChatModel) -> None:
        self._chat_model = chat_model

    def constraint(self, wanted: Wanted) -> Grammar:
        """Returns the constraint of one reply. Raises ConfigError where llguidance is missing, or
        does not take a schema or this model."""
        try:
            matcher = self._matcher(wanted)
        except ConfigError as error:
            raise ConfigError(f"{wanted.field}: {error}") from None
        if matcher.is_error():
            raise ConfigError(self._complaint(wanted))
        return Grammar(matcher, self._chat_model.stop[0])

    def _complaint(self, wanted: Wanted) -> str:
        """Returns which schema llguidance does not take, and why."""
        parts = {f"tools.{n}.parameters": Wanted(s, {}, False) for n, s in wanted.calls.items()}
        if wanted.json is not None:
            parts["response_format"] = Wanted(wanted.json, {}, False)
        for subject, part in parts.items():
            matcher = self._matcher(part)
            if matcher.is_error():
                return f"{subject}: {matcher.get_error().splitlines()[0]}; correct the schema"
        fact = self._matcher(wanted).get_error().splitlines()[0]
        return f"{wanted.field}: {fact}; make the schemas smaller"

    def _matcher(self, wanted: Wanted) -> Any:
        tokenizer, thought = self._tokenizer, self._chat_model.thought
        return _library().LLMatcher(tokenizer, lark(wanted, thought), log_level=0)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        model, library = self._chat_model, _library()
        if model.thought == "opened" and CLOSING in getattr(model.tokenizer, "special", ()):
            raise ConfigError(
                f"not supported where a special token {CLOSING} closes a thought that the request "
                "opens; ask for the form in the message"
            )
        stop = list(model.stop)
        match model.tokenizer:
            case FastTokenizer() as fast:
                return library.LLTokenizer(fast.definition, eos_token=stop)
            case GLM4Tokenizer() as glm4:
                return library.LLTokenizer.from_tiktoken(
                    encoder=glm4.ranks,
                    special_tokens=glm4.special,
                    pattern=glm4.pattern,
                    eos_token=stop,
                    n_vocab=glm4.vocab,
                )
        raise ConfigError(
            "needs a tokenizer.json or GLM-4's tiktoken file, this model has another tokenizer; "
            "ask for the form in the message"
        )


def lark(wanted: Wanted, thought: Thought = "none") -> str:
    """Returns the grammar in llguidance's form of Lark. A call is GLM-4's: the tool's name, a line
    end, JSON. Free text may not hold a call, so that a call has no other way. thought: see
    ChatModel.thought; what is wanted comes behind it."""
    is_text = wanted.json is None and not wanted.must_call
    blank = f"{SPACE}*" if is_text else f"{SPACE}{{0,4}}" if thought != "none" else ""
    rules, lead = _thought(thought, blank)
    for i, (name, schema) in enumerate(wanted.calls.items()):
        behind = rf"[{SPACE}--\n]*" if is_text else ""
        rules[f"HEAD{i}"] = rf"{lead} /{blank}{re.escape(name)}{behind}\n/"
        rules[f"call{i}"] = f"HEAD{i} {_json(schema)}"
    starts = [f"call{i}" for i in range(len(wanted.calls))]
    if wanted.json is not None and not wanted.must_call:
        rules["json"] = f"{lead} {_json(wanted.json)}"
        starts.append("json")
    elif is_text:
        heads = " | ".join(f"HEAD{i}" for i in range(len(wanted.calls)))
        rules |= {"CALL": f"({heads}) {ANY}", "TEXT": f"~CALL & {ANY}"}
        starts.append("TEXT")
    rules = {"start": " | ".join(starts), **rules}
    return "".join(f"{name}: {rule}\n" for name, rule in rules.items())


def _thought(thought: Thought, blank: str) -> tuple[dict[str, str], str]:
    """Returns rules for a thought, and what a reply leads with: the thought, or nothing."""
    if thought == "none":
        return {}, ""
    closing = CLOSING.replace("/", r"\/")
    rules = {
        "CLOSED": rf"/(?s:.*){closing}(?s:.*)/",
        "OPEN": f"~CLOSED & {ANY}",
        "THOUGHT": f'OPEN "{CLOSING}" /{blank}/',
    }
    if thought == "possible":
        rules["THOUGHT"] = f"/{blank}{OPENING}/ {rules['THOUGHT']}"
    return rules, "THOUGHT" if thought == "opened" else "THOUGHT?"


def _json(schema: Json) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': BLANKS})}"


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "llguidance is not installed on the server; pip install 'glm-core[structured]'"
        ) from None
    return llguidance
