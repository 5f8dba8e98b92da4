"""Training conversations: a JSONL file becomes examples, and examples become batches whose loss
counts the replies alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm_core.data.sampler import Batch, BatchArrays
from glm_core.errors import DataError
from glm_core.model.prompt import Prompt
from glm_core.pretrained.chat_model import ChatModel
from glm_core.pretrained.templates import Message

EXPECTED = (
    'expected {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, '
    "...]} that ends with the assistant's"
)


class Example(NamedTuple):
    """One conversation as token ids: the prompt, and the reply to be learned."""

    prompt: Prompt
    reply: tuple[int, ...]
    """ends with a stop token"""

    @property
    def length(self) -> int:
        """Input tokens; the reply's last token is a label only."""
        return len(self.prompt.tokens) + len(self.reply) - 1


def read_examples(chat_model: ChatModel, file: str | Path) -> list[Example]:
    """Returns an example for each line of a JSONL file: the last message is the reply, the messages
    before it are the prompt, in the model's chat format. Raises DataError, PromptError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a JSONL file in UTF-8") from None
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    return [to_example(chat_model, _parse(f"{file}:{n}", line)) for n, line in numbered]


def to_example(chat_model: ChatModel, messages: Sequence[Message]) -> Example:
    """Returns a conversation as an example; its last message is the reply. Raises PromptError."""
    reply = (*chat_model.reply_ids(messages), chat_model.stop[0])
    return Example(chat_model.chat_prompt(messages[:-1]), reply)


def _parse(place: str, line: str) -> list[Message]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}); {EXPECTED}") from None
    match value:
        case {"prompt": str(prompt), "response": str(response)}:
            return [Message("user", prompt), Message("assistant", response)]
        case {"messages": [*items]} if len(items) > 1 and all(map(_is_message, items)):
            messages = [Message(item["role"], item["content"]) for item in items]
            if messages[-1].role == "assistant":
                return messages
    raise DataError(f"{place}: not a conversation; {EXPECTED}")


def _is_message(item: Any) -> bool:
    match item:
        case {"role": "system" | "user" | "assistant", "content": str()}:
            return True
    return False


class ExampleSampler:
    """An endless stream of batches, one example a row. Every epoch has an order of its own; the
    sequence of rows does not depend on the micro-batch."""

    def __init__(self, examples: Sequence[Example], length: int, seed: int) -> None:
        """length: tokens of a row. Raises DataError for no example, or one longer than a row."""
        self.examples, self.length, self.seed = examples, length, seed
        self.index = 0
        """number of the next row"""
        if not examples:
            raise DataError("conversations: there are none; give at least one")
        if long := [i for i, item in enumerate(examples) if item.length > length]:
            raise DataError(
                f"conversations: number {long[0] + 1} and {len(long) - 1} more are longer than a "
                f"row of {length} tokens (up to {max(e.length for e in examples)}); raise "
                "data.length, or shorten them"
            )
        # the text of former versions, so that their runs can be resumed
        pairs = ", ".join(f"Pair(prompt={e.prompt}, answer={e.reply})" for e in examples)
        self._sha256 = hashlib.sha256(f"[{pairs}]".encode()).hexdigest()

    def next(self, micro_batch: int) -> Batch:
        """Returns the next `micro_batch` rows, on the CPU."""
        batch = BatchArrays(micro_batch, self.length, pad=0)
        for row in range(micro_batch):
            epoch, number = divmod(self.index + row, len(self.examples))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
            self._fill(batch, row, self.examples[order[number]])
        self.index += micro_batch
        return batch.freeze()

    def _fill(self, batch: BatchArrays, row: int, item: Example) -> None:
        prompt, n = item.prompt, item.length
        first_label = len(prompt.tokens) - 1  # the prompt's last token predicts the reply's first
        batch.tokens[row, :n] = (*prompt.tokens, *item.reply[:-1])
        batch.labels[row, first_label:n] = item.reply
        batch.loss_weight[row, first_label:n] = 1
        batch.positions[row, :, :n] = np.transpose([prompt.position(i) for i in range(n)])
        batch.key_start[row, :n] = 0
        batch.key_end[row, :n] = [prompt.key_end(i) for i in range(n)]

    def state(self) -> dict[str, Any]:
        """Returns the state that `restore` continues from, as JSON values."""
        return {"index": self.index, "of": self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state. Raises DataError if it was saved with other conversations,
        another length or another seed."""
        if state.get("of") != self._identity() or type(state.get("index")) is not int:
            raise DataError(
                "sampler state: saved with other conversations, another data.length or seed, or "
                "on another day by a chat template that prints it; resume with the same (the day "
                "in GLM_CORE_DATE)"
            )
        self.index = state["index"]

    def _identity(self) -> dict[str, Any]:
        return {"pairs": self._sha256, "length": self.length, "seed": self.seed}
