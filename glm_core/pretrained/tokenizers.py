"""Tokenizers of published checkpoints: which file a folder uses, and the ids of special tokens.

Ids come from the folder's files. Python code in a folder is never run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import DataError
from glm_core.model.prompt import PromptTokenizer

CONFIG = "tokenizer_config.json"
FILES = ("ice_text.model", "tokenizer.json", "tokenizer.model")
"""a folder with a tokenizer holds one of these"""
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
"""special tokens that ChatGLM2's code puts behind the sentencepiece vocabulary
(tokenization_chatglm.py, SPTokenizer)"""
ROLE_SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""special tokens that ChatGLM3's code puts behind those of ChatGLM2"""
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
"""special tokens of GLM-4 (tokenization_chatglm.py, ChatGLM4Tokenizer)"""
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""regular expression that splits text into words before byte pairs are merged (GLM-4's
tokenization_chatglm.py, pat_str); tokenizer.model does not contain it"""
KNOWN_CLASSES = ("ChatGLMTokenizer", "ChatGLM4Tokenizer")
"""tokenizer classes in their authors' code whose files are read here"""
MAX_BLANK_RUN = 80
"""longest run of blanks that is one token of ChatGLM-6B; the shortest has 2"""


class TextTokenizer(Protocol):
    """Converts text to token ids and back."""

    vocab: int
    """number of ids, special tokens included"""
    sha256: str
    """hash of the tokenizer's file"""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class BlankTokenizer(TextTokenizer, PromptTokenizer, Protocol):
    """A tokenizer with GLM's blanks."""


class ChatTokenizer(TextTokenizer, Protocol):
    """A tokenizer with named special tokens, which a chat template may spell."""

    special: dict[str, int]
    """ids of the special tokens"""
    prefix: list[int]
    """ids that begin every prompt"""
    suffix: list[int]
    """ids that end every text to continue"""


PROBES = ("a", "1", "好")
"""texts that show what a post-processor puts around a text; a vocabulary knows one of them"""


class FastTokenizer:
    """tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, file: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{file}: tokenizers is not installed; pip install 'glm-core[serve]'"
            ) from None
        data = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{file}: not a tokenizer.json ({error}); fetch it again") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.vocab = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.prefix, self.suffix = self._around()
        self._lock = threading.Lock()
        """encode's setting belongs to the tokenizer, not to the call"""

    @property
    def definition(self) -> str:
        """The content of tokenizer.json."""
        return str(self._tokenizer.to_str())

    def _around(self) -> tuple[list[int], list[int]]:
        """Returns the ids that the post-processor puts before and after a text."""
        for text in PROBES:
            plain = self._tokenizer.encode(text, add_special_tokens=False).ids
            whole = self._tokenizer.encode(text).ids
            starts = range(len(whole) - len(plain) + 1)
            begin = next((i for i in starts if whole[i : i + len(plain)] == plain), None)
            if plain and begin is not None:
                return whole[:begin], whole[begin + len(plain) :]
        return self._tokenizer.encode("").ids, []

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without the prefix; special tokens that it spells stay text.
        Raises DataError if `text` is not valid Unicode."""
        return self._encode(text, special_as_text=True)

    def encode_with_special(self, text: str) -> list[int]:
        """Returns the ids of `text` without the prefix; special tokens that it spells count as
        such, with the blanks that they take in. Raises DataError as `encode`."""
        return self._encode(text, special_as_text=False)

    def _encode(self, text: str, *, special_as_text: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = special_as_text
            return list(self._tokenizer.encode(_valid(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids are left out."""
        return str(self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab]))


class ChatGLM2Tokenizer:
    """tokenizer.model of ChatGLM2 and ChatGLM3: a sentencepiece model; the ids of special tokens
    follow its vocabulary."""

    def __init__(self, file: Path, config: dict[str, Any], *, roles: bool) -> None:
        """config: tokenizer_config.json. roles: whether ChatGLM3's role tokens exist."""
        self._processor = _sentencepiece(file)
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._size = int(self._processor.vocab_size())
        names = CHATGLM2_SPECIAL + (ROLE_SPECIAL if roles else ())
        self.special = _special_ids(file, config, self._size, names, ("[gMASK]", "sop"))
        self.vocab = max(self.special.values()) + 1
        self.prefix = [self.special["[gMASK]"], self.special["sop"]]
        self.suffix: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without the prefix; special tokens that it spells stay text.
        Raises DataError if `text` is not valid Unicode."""
        return list(self._processor.encode(_valid(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids are left out."""
        return str(self._processor.decode([int(i) for i in ids if 0 <= i < self._size]))


class GLM4Tokenizer:
    """tokenizer.model of GLM-4: a line `base64 rank` per byte string, read by the `tiktoken`
    package; the ids of special tokens follow the ranks."""

    def __init__(self, file: Path, config: dict[str, Any]) -> None:
        """config: tokenizer_config.json."""
        try:
            import tiktoken
        except ImportError:
            raise DataError(
                f"{file}: tiktoken is not installed; pip install 'glm-core[serve]'"
            ) from None
        data = file.read_bytes()
        self.ranks, self.pattern = _ranks(file, data), GLM4_PATTERN
        self._size = len(self.ranks)
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
        )
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.special = _special_ids(file, config, self._size, GLM4_SPECIAL, ("[gMASK]", "<sop>"))
        self.vocab = max(self.special.values()) + 1
        self.prefix = [self.special["[gMASK]"], self.special["<sop>"]]
        self.suffix: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without the prefix; special tokens that it spells stay text.
        Raises DataError if `text` is not valid Unicode."""
        return self._encoding.encode_ordinary(_valid(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids are left out."""
        data = self._encoding.decode_bytes([int(i) for i in ids if 0 <= i < self._size])
        return data.decode(errors="replace")


def _ranks(file: Path, data: bytes) -> dict[bytes, int]:
    """Returns the byte strings of a tiktoken file with their ranks, which are their ids."""
    try:
        rows = [line.split() for line in data.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise DataError(f"{file}: not a tiktoken file ({error}); fetch it again") from None
    consecutive = sorted(ranks.values()) == list(range(len(rows)))
    if not consecutive or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(
            f"{file}: {len(rows)} lines are not ranks from 0 on that cover every byte; it is "
            "truncated: fetch it again"
        )
    return ranks


def _special_ids(
    file: Path, config: dict[str, Any], size: int, names: tuple[str, ...], needed: tuple[str, ...]
) -> dict[str, int]:
    """Returns the ids of special tokens: `added_tokens_decoder` of tokenizer_config.json where it
    lists ids from `size` on, else `names` in the order of the authors' code."""
    default = {name: size + i for i, name in enumerate(names)}
    try:
        entries = (config.get("added_tokens_decoder") or {}).items()
        listed = {str(t["content"]): int(i) for i, t in entries if int(i) >= size}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file.with_name(CONFIG)}: added_tokens_decoder cannot be read ({error!r}); fetch it "
            "again"
        ) from None
    # a list that agrees with the default may be partial; any other list replaces the default
    agrees = all(default.get(name, i) == i for name, i in listed.items())
    special = {**default, **listed} if agrees else listed
    if missing := set(needed) - special.keys():
        raise DataError(
            f"{file.with_name(CONFIG)}: added_tokens_decoder lists no token "
            f"{' or '.join(sorted(missing))}; fetch it again"
        )
    if len(set(special.values())) < len(special):
        raise DataError(
            f"{file.with_name(CONFIG)}: two special tokens have one id, after a vocabulary of "
            f"{size}; check that it belongs to this tokenizer.model"
        )
    return special


class ChatGLM6BTokenizer:
    """ice_text.model of ChatGLM-6B: a sentencepiece model whose ids follow `num_image_tokens`
    unused ones; newlines, tabs and runs of blanks are tokens (tokenization_chatglm.py,
    SPTokenizer)."""

    def __init__(self, file: Path, config: dict[str, Any]) -> None:
        """config: tokenizer_config.json."""
        self._processor = _sentencepiece(file)
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._offset = int(config.get("num_image_tokens", 0))
        self.vocab = int(self._processor.vocab_size()) + self._offset
        names = {"mask": "[MASK]", "gmask": "[gMASK]", "smask": "[sMASK]"}
        names |= {"sop": "<sop>", "eop": "<eop>", "eos": "</s>"}
        own_ids = {key: self._processor.piece_to_id(name) for key, name in names.items()}
        if missing := [names[k] for k, i in own_ids.items() if i == self._processor.unk_id()]:
            raise DataError(f"{file}: has no token {', '.join(missing)}; it is not ChatGLM-6B's")
        ids = {key: i + self._offset for key, i in own_ids.items()}
        self.mask, self.gmask, self.smask = ids["mask"], ids["gmask"], ids["smask"]
        self.sop, self.eop, self.eos = ids["sop"], ids["eop"], ids["eos"]
        self._special = set(own_ids.values())
        # text that spells a special token is cut after its first character, so that it stays text
        cuts = (f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names.values())
        self._cut = re.compile("|".join(cuts))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; special tokens that it spells stay text. Raises DataError if
        `text` is not valid Unicode."""
        text = _valid(text).replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{MAX_BLANK_RUN}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        first, *rest = self._cut.split(text)
        ids = list(self._processor.encode(first))
        for part in rest:
            # sentencepiece puts a blank before each text: it goes before a newline, and both go
            ids += self._processor.encode("<n>" + part)[2:]
        return [int(i) + self._offset for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids are left out."""
        size = self.vocab - self._offset
        own = [int(i) - self._offset for i in ids]
        text = self._processor.decode([i for i in own if 0 <= i < size and i not in self._special])
        text = str(text).replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text)


AnyTokenizer = FastTokenizer | ChatGLM2Tokenizer | GLM4Tokenizer | ChatGLM6BTokenizer | Tokenizer


def load_tokenizer(folder: Path, layout: str) -> AnyTokenizer:
    """Returns the tokenizer in a checkpoint's folder, chosen by what the files hold. layout: the
    checkpoint's, for error messages. Raises DataError."""
    config = read_json(folder / CONFIG)
    if (file := folder / "ice_text.model").is_file():
        return ChatGLM6BTokenizer(file, config)
    if (file := folder / "tokenizer.json").is_file():
        return FastTokenizer(file)
    name = str(config.get("tokenizer_class", ""))
    if config.get("auto_map") and name not in KNOWN_CLASSES:
        raise DataError(
            f"{folder}: its tokenizer {name} is Python code in the folder, which is never run; "
            f"known without tokenizer.json: {', '.join(KNOWN_CLASSES)}; if you trust the code, "
            "save tokenizer.json with transformers and put it there"
        )
    if (file := folder / "tokenizer.model").is_file():
        return _load_tokenizer_model(file, config)
    raise DataError(
        f"{folder}: no tokenizer for layout {layout}; known: tokenizer.json, tokenizer.model of "
        "ChatGLM2, ChatGLM3, GLM-4 or a glm-core run, ice_text.model of ChatGLM-6B; put one there"
    )


def _load_tokenizer_model(
    file: Path, config: dict[str, Any]
) -> ChatGLM2Tokenizer | GLM4Tokenizer | Tokenizer:
    """Returns the tokenizer of a tokenizer.model, whose name says nothing of its format."""
    with file.open("rb") as handle:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", handle.read(4096)):
            return GLM4Tokenizer(file, config)
    processor = _sentencepiece(file)
    if processor.piece_to_id("<eod>") != processor.unk_id():
        return Tokenizer(file.read_bytes())
    # ChatGLM2's and ChatGLM3's models are the same file; only the files beside it differ
    code = file.with_name("tokenization_chatglm.py")
    other_files = json.dumps(config) + (
        code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    )
    roles = any(name in other_files for name in ROLE_SPECIAL)
    return ChatGLM2Tokenizer(file, config, roles=roles)


def read_json(file: Path) -> dict[str, Any]:
    """Returns a file's JSON object, empty if there is no file. Raises DataError."""
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
