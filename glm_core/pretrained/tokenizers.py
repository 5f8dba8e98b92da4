"""Tokenizers as other projects' checkpoints store them: which file, which special tokens. Ids come
from the files; nothing of a folder is run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import DataError

CONFIG = "tokenizer_config.json"
FILES = ("ice_text.model", "tokenizer.json", "tokenizer.model")
"""one of which a folder must hold to be talked to"""
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
"""what ChatGLM2's code puts after the pieces (tokenization_chatglm.py, SPTokenizer)"""
ROLE_SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""what ChatGLM3's puts after those"""
GLM4_SPECIAL = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    *ROLE_SPECIAL,
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""GLM-4's (tokenization_chatglm.py, ChatGLM4Tokenizer)"""
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""how GLM-4 cuts text before it merges bytes; the tokenizer's file does not say it (there,
pat_str)"""
CODED = ("ChatGLMTokenizer", "ChatGLM4Tokenizer")
"""tokenizers in their authors' code whose files are read here"""
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
    pieces."""

    def __init__(self, file: Path, facts: dict[str, Any], roles: bool) -> None:
        """roles: ChatGLM3's tokens are there too."""
        self._pieces = _sentencepiece(file)
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._size = int(self._pieces.vocab_size())
        names = CHATGLM2_SPECIAL + (ROLE_SPECIAL if roles else ())
        self.special = _special(file, facts, self._size, names, ("[gMASK]", "sop"))
        self.vocab = max(self.special.values()) + 1
        self.prefix = [self.special["[gMASK]"], self.special["sop"]]

    def encode(self, text: str) -> list[int]:
        """Without prefix. Raises DataError if `text` is not valid Unicode."""
        return list(self._pieces.encode(_valid(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        return str(self._pieces.decode([int(i) for i in ids if 0 <= i < self._size]))


class GLM4:
    """tokenizer.model of GLM-4: a line `base64 rank` for each byte string, read by the `tiktoken`
    package, with special tokens behind them."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError(
                f"{file}: tiktoken is not installed; pip install 'glm-core[serve]'"
            ) from None
        data = file.read_bytes()
        self._size = len(ranks := _ranks(file, data))
        self._pieces = tiktoken.Encoding(
            file.name, pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.special = _special(file, facts, self._size, GLM4_SPECIAL, ("[gMASK]", "<sop>"))
        self.vocab = max(self.special.values()) + 1
        self.prefix = [self.special["[gMASK]"], self.special["<sop>"]]

    def encode(self, text: str) -> list[int]:
        """Without prefix. Raises DataError if `text` is not valid Unicode."""
        return self._pieces.encode_ordinary(_valid(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        told = self._pieces.decode_bytes([int(i) for i in ids if 0 <= i < self._size])
        return told.decode(errors="replace")


def _ranks(file: Path, data: bytes) -> dict[bytes, int]:
    """The byte strings of a tiktoken file; their ranks are the ids."""
    try:
        rows = [line.split() for line in data.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise DataError(f"{file}: not a tiktoken file ({error}); fetch it again") from None
    whole = sorted(ranks.values()) == list(range(len(rows)))
    if not whole or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(
            f"{file}: {len(rows)} lines are not ranks from 0 on that cover every byte; it is "
            "truncated: fetch it again"
        )
    return ranks


def _special(
    file: Path, facts: dict[str, Any], size: int, names: tuple[str, ...], needed: tuple[str, ...]
) -> dict[str, int]:
    """Special tokens behind `size` pieces: in the order of the authors' code (`names`), or where
    tokenizer_config.json (`added_tokens_decoder`) puts them."""
    special = {name: size + i for i, name in enumerate(names)}
    try:
        listed = (facts.get("added_tokens_decoder") or {}).items()
        told = {str(t["content"]): int(i) for i, t in listed if int(i) >= size}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file.with_name(CONFIG)}: added_tokens_decoder cannot be read ({error!r}); fetch it "
            "again"
        ) from None
    # a list may be partial; one that says something else replaces all
    agrees = all(special.get(name, i) == i for name, i in told.items())
    special = {**special, **told} if agrees else told
    if strange := set(needed) - special.keys():
        raise DataError(f"{file}: no token {' or '.join(sorted(strange))} is listed beside it")
    if len(set(special.values())) < len(special):
        raise DataError(
            f"{file.with_name(CONFIG)}: two special tokens have one id beside {size} pieces; check "
            "that it belongs to this tokenizer.model"
        )
    return special


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
        # a special token that a text spells is cut after its first character
        apart = (f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names.values())
        self._cut = re.compile("|".join(apart))

    def encode(self, text: str) -> list[int]:
        """Text that spells a special token stays text. Raises DataError if `text` is not valid
        Unicode."""
        text = _valid(text).replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{MOST_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        first, *rest = self._cut.split(text)
        ids = list(self._pieces.encode(first))
        for part in rest:  # without the blank that sentencepiece puts before a text: the same file
            ids += self._pieces.encode("<n>" + part)[2:]
        return [int(i) + self._offset for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and unknown ids give nothing."""
        size = self.vocab - self._offset
        own = [int(i) - self._offset for i in ids]
        text = self._pieces.decode([i for i in own if 0 <= i < size and i not in self._special])
        text = str(text).replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text)


Tokenizers = Fast | ChatGLM2 | GLM4 | ChatGLM6B | Tokenizer


def beside(folder: Path, layout: str) -> Tokenizers:
    """The tokenizer in a checkpoint's folder, by what its files hold. Raises DataError."""
    facts = read_json(folder / CONFIG)
    if (file := folder / "ice_text.model").is_file():
        return ChatGLM6B(file, facts)
    if (file := folder / "tokenizer.json").is_file():
        return Fast(file)
    name = str(facts.get("tokenizer_class", ""))
    if facts.get("auto_map") and name not in CODED:
        raise DataError(
            f"{folder}: its tokenizer {name} is Python code in the folder, which is never run; "
            f"known without tokenizer.json: {', '.join(CODED)}; where you trust it, save "
            "tokenizer.json with transformers and put it there"
        )
    if (file := folder / "tokenizer.model").is_file():
        return _by_content(file, facts)
    raise DataError(
        f"{folder}: no tokenizer for layout {layout}; known: tokenizer.json, tokenizer.model of "
        "ChatGLM2, ChatGLM3, GLM-4 or a run of ours, ice_text.model of ChatGLM-6B; put it there"
    )


def _by_content(file: Path, facts: dict[str, Any]) -> ChatGLM2 | GLM4 | Tokenizer:
    with file.open("rb") as handle:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", handle.read(4096)):
            return GLM4(file, facts)
    pieces = _sentencepiece(file)
    if pieces.piece_to_id("<eod>") != pieces.unk_id():
        return Tokenizer(file.read_bytes())
    # ChatGLM2's and ChatGLM3's models are the same file; only what lies beside them differs
    code = file.with_name("tokenization_chatglm.py")
    told = json.dumps(facts) + (code.read_text(errors="replace") if code.is_file() else "")
    return ChatGLM2(file, facts, roles=any(name in told for name in ROLE_SPECIAL))


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
        if not (data := file.read_bytes()):
            raise RuntimeError("empty")
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{file}: neither a sentencepiece model ({str(error).splitlines()[0]}) nor tiktoken's "
            "lines; fetch it again"
        ) from None


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("text: holds half a surrogate pair; pass valid Unicode") from None
    return text
