"""Where a model to talk to comes from, and how it is talked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from glm_core import config, environment
from glm_core.data import corpus
from glm_core.data import tokenizer as tokenizers
from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import CheckpointError, PromptError
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, PromptTokenizer, blank, encode, part_a
from glm_core.training import checkpoint


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


class Vocabulary(PromptTokenizer, Protocol):
    """A tokenizer with GLM's blanks that knows its size and identity."""

    vocab: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model of the blank-filling kind, with its tokenizer."""

    model: GLM
    tokenizer: Vocabulary
    name: str
    files: tuple[Path, ...] = ()
    """what it is talked to with: the tokenizer's files"""

    @property
    def fills(self) -> bool:
        """Whether a text may have blanks."""
        return True

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (self.tokenizer.eop, self.tokenizer.eos)

    def complete(self, text: str) -> Prompt:
        """The prompt that fills the first blank of `text`, or goes on after it where it has none.
        Raises PromptError for an empty text."""
        if not text:
            raise PromptError("prompt: is empty; write something to go on from")
        a = part_a(encode(text, self.tokenizer), self.tokenizer)
        return blank(a, self.tokenizer, self.model.config.positions)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """ChatGLM-6B's rounds (its modeling_chatglm.py, chat); system messages come first, as text.
        What people write is text: blanks they spell stay text. Raises PromptError where the last
        word is not the user's."""
        if not messages or messages[-1].role != "user":
            raise PromptError("messages: the last one must be the user's; add a question")
        system = "".join(m.content + "\n" for m in messages if m.role == "system")
        *past, last = [m for m in messages if m.role != "system"]
        text, rounds = "", 0
        for message in past:
            if message.role == "user":
                text += f"[Round {rounds}]\n问：{message.content}\n"
            else:
                text, rounds = text + f"答：{message.content}\n", rounds + 1
        question = f"[Round {rounds}]\n问：{last.content}\n答：" if past else last.content
        a = part_a(self.tokenizer.encode(system + text + question), self.tokenizer)
        return blank(a, self.tokenizer, self.model.config.positions)

    def answer(self, messages: Sequence[Message]) -> list[int]:
        """What a model that says the last message has said after `chat` of those before it, without
        what ends it."""
        return self.tokenizer.encode(messages[-1].content)


def from_run(
    path: str | Path, cache_dir: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> Source:
    """The model of a training run (its folder, or one of its checkpoints), rounded to `dtype`.
    Raises CheckpointError, DataError."""
    file = checkpoint.find(Path(path))
    model, settings, facts = trained(file)
    run = file.parent.parent
    kept = run / checkpoint.TOKENIZER
    if kept.is_file():
        tokenizer = Tokenizer(kept.read_bytes())
    else:  # a run from before it was kept
        folder = Path(cache_dir or environment.cache())
        tokenizer = tokenizers.load(corpus.load(settings.data, folder), settings.data.vocab, folder)
    known = facts["sampler"].get("of", {}).get("tokenizer", tokenizer.sha256)
    if known != tokenizer.sha256:
        raise CheckpointError(
            f"{file}: was trained with another tokenizer ({known[:12]}, found "
            f"{tokenizer.sha256[:12]}); put the run's tokenizer.model beside its config.toml"
        )
    files = (kept,) if kept.is_file() else ()
    return Source(model=model.to(dtype), tokenizer=tokenizer, name=run.resolve().name, files=files)


def trained(file: Path) -> tuple[GLM, config.RunConfig, dict[str, Any]]:
    """The frozen float32 model of a run's checkpoint, its config and what else the checkpoint says.
    Raises CheckpointError."""
    tensors, facts = checkpoint.load(file)
    settings = config.from_dict(config.RunConfig, facts["config"])
    model = GLM(settings.model)
    weights = {n: tensors.get(f"master.{n}") for n, _ in model.named_parameters()}
    if missing := [n for n, w in weights.items() if w is None]:
        raise CheckpointError(
            f"{file}: lacks {missing[0]} and {len(missing) - 1} more, it holds adapters without "
            "their base; give the base, and this run as --adapter"
        )
    model.load_state_dict(weights)
    return model.requires_grad_(False), settings, facts
