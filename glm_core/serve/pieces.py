"""Tokenizers as other projects' checkpoints store them: which file, which special tokens. No id is
known beforehand: all come from the files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import DataError

CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
"""what ChatGLM2's tokenizer puts after the pieces where its config lists nothing
(tokenization_chatglm.py, SPTokenizer)"""
MOST_BLANKS = 80
"""ChatGLM-6B has a piece for each run of 2 to this many blanks"""


class Vocabulary(Protocol):
    """Text that people wrote to ids and back, special tokens by their names."""

    sha256: str
    vocab: int
    special: dict[str, int]
    prefix: list[int]
    """what stands before every text"""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Fast:
    """tokenizer.json, read by the `tokenizers` package. Text that spells a special token stays
    text."""

    def __init__(self, file: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{file}: tokenizers is not installed; pip install 'glm-core[serve]'"
            ) from None
        data = file.read_bytes()
        try:
            self._pieces = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{file}: not a tokenizer.json ({error}); fetch it again") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        added = self._pieces.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.vocab = max(self._pieces.get_vocab(with_added_tokens=True).values()) + 1
        self.prefix: list[int] = self._pieces.encode("").ids
        self._pieces.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Without prefix. Raises DataError if `text` is not valid Unicode."""
        ids: list[int] = self._pieces.encode(_valid(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        return str(self._pieces.decode([i for i in ids if 0 <= i < self.vocab]))


class ChatGLM2:
    """tokenizer.model of ChatGLM2 and ChatGLM3: sentencepiece, with special tokens behind the
    pieces, as listed in tokenizer_config.json (`added_tokens_decoder`)."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self._pieces = _sentencepiece(file)
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        size = int(self._pieces.vocab_size())
        listed = facts.get("added_tokens_decoder")
        if listed:
            self.special = {str(t["content"]): int(i) for i, t in listed.items() if int(i) >= size}
        else:
            self.special = {name: size + i for i, name in enumerate(CHATGLM2_SPECIAL)}
        self._size, self.vocab = size, max([size - 1, *self.special.values()]) + 1
        if strange := {"[gMASK]", "sop"} - self.special.keys():
            raise DataError(f"{file}: no token {' or '.join(sorted(strange))} is listed beside it")
        self.prefix = [self.special["[gMASK]"], self.special["sop"]]

    def encode(self, text: str) -> list[int]:
        """Without prefix. Raises DataError if `text` is not valid Unicode."""
        return list(self._pieces.encode(_valid(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        return str(self._pieces.decode([int(i) for i in ids if 0 <= i < self._size]))


class ChatGLM6B:
    """ice_text.model of ChatGLM-6B: sentencepiece after `num_image_tokens` unused ids; newlines,
    tabs and runs of blanks are pieces (tokenization_chatglm.py, SPTokenizer)."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self._pieces = _sentencepiece(file)
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._offset = int(facts.get("num_image_tokens", 0))
        self.vocab = int(self._pieces.vocab_size()) + self._offset
        names = {"mask": "[MASK]", "gmask": "[gMASK]", "smask": "[sMASK]"}
        names |= {"sop": "<sop>", "eop": "<eop>", "eos": "</s>"}
        known = {key: self._pieces.piece_to_id(name) for key, name in names.items()}
        if strange := [names[k] for k, i in known.items() if i == self._pieces.unk_id()]:
            raise DataError(f"{file}: has no piece {', '.join(strange)}; it is not ChatGLM-6B's")
        ids = {key: i + self._offset for key, i in known.items()}
        self.mask, self.gmask, self.smask = ids["mask"], ids["gmask"], ids["smask"]
        self.sop, self.eop, self.eos = ids["sop"], ids["eop"], ids["eos"]
        self._special = {ids[key] - self._offset for key in ids}

    def encode(self, text: str) -> list[int]:
        """Raises DataError if `text` is not valid Unicode."""
        text = _valid(text).replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{MOST_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [int(i) + self._offset for i in self._pieces.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        size = self.vocab - self._offset
        own = [int(i) - self._offset for i in ids]
        text = self._pieces.decode([i for i in own if 0 <= i < size and i not in self._special])
        text = str(text).replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text)


def beside(folder: Path, layout: str) -> Fast | ChatGLM2 | ChatGLM6B | Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises DataError."""
    facts = read_json(folder / "tokenizer_config.json")
    if (file := folder / "tokenizer.json").is_file():
        return Fast(file)
    if layout == "chatglm-6b" and (file := folder / "ice_text.model").is_file():
        return ChatGLM6B(file, facts)
    file = folder / "tokenizer.model"
    if layout == "chatglm2" and file.is_file():
        return ChatGLM2(file, facts)
    if layout == "glm-core" and file.is_file():
        return Tokenizer(file.read_bytes())
    raise DataError(
        f"{folder}: no tokenizer for layout {layout}; known: tokenizer.json, tokenizer.model of "
        "ChatGLM2 and ChatGLM3 or of a run of ours, ice_text.model of ChatGLM-6B; put it there"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises DataError."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{file}: must hold a JSON object; fetch it again")
    return value


def _sentencepiece(file: Path) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{file}: not a sentencepiece model ({str(error).splitlines()[0]}); GLM-4's is "
            "tiktoken's, use the tokenizer.json of its transformers version instead"
        ) from None


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("text: holds half a surrogate pair; pass valid Unicode") from None
    return text
