"""Chats in the terminal and shows the reply while it is generated."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import TextIO

from glm_core.errors import PromptError
from glm_core.model.generate import stream
from glm_core.model.prompt import Prompt
from glm_core.model.runner import Runner
from glm_core.model.sample import Sampling
from glm_core.pretrained.chat_model import ChatModel
from glm_core.pretrained.templates import Message
from glm_core.serve.detokenizer import Detokenizer

HELP = "/clear forgets the conversation, /quit leaves, Ctrl-C stops a reply"


def stream_text(
    chat_model: ChatModel,
    prompt: Prompt,
    sampling: Sampling,
    runner: Runner | None = None,
    strip_start: bool = False,
) -> Iterator[str]:
    """Yields the generated text as it becomes known. runner: computes in place of the model;
    strip_start: see Detokenizer. Raises PromptError, GenerationError."""
    tokenizer = chat_model.tokenizer
    detokenizer = Detokenizer(tokenizer.decode, strip_start=strip_start)
    model = runner or chat_model.model
    for token in stream(model, prompt, sampling, num_ids=tokenizer.vocab):
        if text := detokenizer.feed([token]):
            yield text
    yield detokenizer.feed([], last=True)


def chat(
    chat_model: ChatModel,
    sampling: Sampling,
    lines: TextIO,
    out: TextIO,
    runner: Runner | None = None,
) -> None:
    """Chats until `lines` ends or a line says /quit. A conversation that outgrows the context loses
    its oldest turns, and says so. runner: computes in place of the model."""
    messages: list[Message] = []
    sampling = dataclasses.replace(sampling, stop=chat_model.stop)
    if lines.isatty():
        print(f"{chat_model.name}: {HELP}", file=sys.stderr)
    while question := _read_question(lines, out):
        if question == "/quit":
            return
        if question == "/clear":
            messages = []
            continue
        messages.append(Message("user", question))
        reply = _print_reply(chat_model, messages, sampling, out, runner)
        if reply is None:
            messages.pop()
        else:
            messages.append(Message("assistant", reply))


def _read_question(lines: TextIO, out: TextIO) -> str:
    """Returns the next line that is not blank, empty at the end."""
    while True:
        if lines.isatty():
            print("> ", end="", file=out, flush=True)
        line = lines.readline()
        if not line or line.strip():
            return line.strip()


def _print_reply(
    chat_model: ChatModel,
    messages: list[Message],
    sampling: Sampling,
    out: TextIO,
    runner: Runner | None,
) -> str | None:
    """Prints the reply and returns it; an interrupt ends it early. Returns None where the question
    is refused, after printing why."""
    reply = ""
    while True:
        try:
            prompt = chat_model.chat_prompt(messages)
        except PromptError as error:  # of the chat format, whatever the length
            print(f"glm-core: {error}", file=sys.stderr)
            return None
        try:
            for text in stream_text(chat_model, prompt, sampling, runner, strip_start=True):
                reply += text
                print(text, end="", file=out, flush=True)
        except PromptError as error:
            if len(messages) == 1:
                print(f"glm-core: {error}", file=sys.stderr)
                return None
            print("(the conversation is too long; its oldest turn is forgotten)", file=sys.stderr)
            del messages[:2]
            continue
        except KeyboardInterrupt:
            pass
        print(file=out)
        return reply
