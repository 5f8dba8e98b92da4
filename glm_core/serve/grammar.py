"""Replies in JSON: a grammar forbids every token after which no JSON of the schema can follow.

The grammar is llguidance's, an optional package; the tokenizer must have bytes for its tokens
(tokenizer.json, or GLM-4's tiktoken file)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glm_core.errors import ConfigError
from glm_core.pretrained.chat_model import ChatModel
from glm_core.pretrained.tokenizers import FastTokenizer, GLM4Tokenizer

BLANKS = {"whitespace_pattern": r"[ \n\r\t]{1,20}"}
"""blanks between JSON's parts; without a limit a model can write them for ever"""


class JsonConstraint:
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

    def json(self, schema: dict[str, Any]) -> JsonConstraint:
        """Returns the constraint of a reply that is JSON of this schema. Raises ConfigError where
        llguidance is missing, or does not take the schema or this model."""
        library, tokenizer = _library(), self._tokenizer
        grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides=BLANKS)
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            fact = matcher.get_error().splitlines()[0]
            raise ConfigError(f"response_format: {fact}; correct the schema")
        return JsonConstraint(matcher, self._chat_model.stop[0])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        model, library = self._chat_model, _library()
        if model.thought == "opened":
            raise ConfigError(
                "response_format: not supported for a model whose requests open a thought; ask for "
                "JSON in the message"
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
            "response_format: needs a tokenizer.json or GLM-4's tiktoken file, this model has "
            "another tokenizer; ask for JSON in the message"
        )


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "response_format: llguidance is not installed on the server; pip install "
            "'glm-core[structured]'"
        ) from None
    return llguidance
