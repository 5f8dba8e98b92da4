"""A conversation in the terminal, each word shown as soon as it is known."""

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
from glm_core.pretrained.source import Message, Source
from glm_core.serve.text import TextStream

HELP = "/clear forgets the conversation, /quit leaves, Ctrl-C stops an answer"


def written(
    source: Source,
    prompt: Prompt,
    sampling: Sampling,
    runner: Runner | None = None,
    spoken: bool = False,
) -> Iterator[str]:
    """The answer's text as it comes. runner: in place of the source's model; spoken: as of
    TextStream. Raises PromptError, GenerationError."""
    text = TextStream(source.tokenizer.decode, spoken=spoken)
    for token in stream(runner or source.model, prompt, sampling, num_ids=source.tokenizer.vocab):
        if piece := text.feed([token]):
            yield piece
    yield text.feed([], last=True)


def talk(source: Source, sampling: Sampling, lines: TextIO, out: TextIO) -> None:
    """Until the lines end or /quit. A conversation that outgrows the context loses its oldest
    turns, and says so."""
    turns: list[Message] = []
    sampling = dataclasses.replace(sampling, stop=source.stop)
    if lines.isatty():
        print(f"{source.name}: {HELP}", file=sys.stderr)
    while question := _asked(lines, out):
        if question == "/quit":
            return
        if question == "/clear":
            turns = []
            continue
        turns.append(Message("user", question))
        answer = _answered(source, turns, sampling, out)
        turns.append(Message("assistant", answer))


def _asked(lines: TextIO, out: TextIO) -> str:
    """The next line with something on it; empty at the end."""
    while True:
        if lines.isatty():
            print("> ", end="", file=out, flush=True)
        line = lines.readline()
        if not line or line.strip():
            return line.strip()


def _answered(source: Source, turns: list[Message], sampling: Sampling, out: TextIO) -> str:
    """Prints the answer; an interrupt ends it there."""
    said = ""
    while True:
        try:
            for piece in written(source, source.chat(turns), sampling, spoken=True):
                said += piece
                print(piece, end="", file=out, flush=True)
        except PromptError as error:
            if len(turns) == 1:
                print(f"glm-core: {error}", file=sys.stderr)
                return said
            print("(the conversation is too long; its oldest turn is forgotten)", file=sys.stderr)
            del turns[:2]
            continue
        except KeyboardInterrupt:
            pass
        print(file=out)
        return said
