"""Turns text into token ids with a byte-pair model trained on the corpus, and GLM's special tokens.

The vocabulary holds <unk>, the special tokens, 256 bytes, and the learned tokens. Every string has
an encoding (bytes stand in for what was not learned). Text that spells a special token, such as
"<eos>", stays text."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from glm_core.data import cache
from glm_core.data.corpus import Corpus
from glm_core.errors import DataError

SPECIAL = {
    "mask": "[MASK]",
    "gmask": "[gMASK]",
    "smask": "[sMASK]",
    "eod": "<eod>",
    "sop": "<sop>",
    "eop": "<eop>",
    "eos": "<eos>",
    "pad": "<pad>",
}
MIN_VOCAB = 300
"""<unk>, the special tokens, 256 bytes, and some room for learned tokens"""
TRAINING_CHARS = 4_000_000
LINE_CHARS = 1000
"""sentencepiece skips lines of more than 4192 bytes; 1000 characters of UTF-8 have at most 4000"""
SPACE = "\u2581"
"""stands for a blank inside sentencepiece; where the text itself has this character, its bytes are
used"""
SENTENCE_END = re.compile("[.?!;:。？！；：…\n]")


class Tokenizer:
    """Maps text to ids and back exactly: `decode(encode(text)) == text`, also for the joined ids of
    two texts."""

    def __init__(self, model: bytes) -> None:
        if not model:
            raise DataError("tokenizer: not a sentencepiece model (empty); train it")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"tokenizer: not a sentencepiece model ({error})") from None
        self.model = model
        """the serialised sentencepiece model; `Tokenizer(model)` restores an equal tokenizer"""
        self.sha256 = cache.digest([model])
        self.vocab = int(self._processor.vocab_size())
        """number of ids; smaller than the configured vocabulary if the corpus is small"""
        self.unk = int(self._processor.unk_id())
        self.mask = self._id("[MASK]")
        self.gmask = self._id("[gMASK]")
        self.smask = self._id("[sMASK]")
        self.eod = self._id("<eod>")
        self.sop = self._id("<sop>")
        self.eop = self._id("<eop>")
        self.eos = self._id("<eos>")
        self.pad = self._id("<pad>")
        self._space = [self._id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ends = (bool(SENTENCE_END.search(self.decode([i]))) for i in range(self.vocab))
        self.ends_sentence = np.fromiter(ends, bool, self.vocab)
        """bool [V]: the token contains a mark that ends a sentence (GLM: . ? ! ; : and a
        newline)"""

    def _id(self, token: str) -> int:
        id = int(self._processor.piece_to_id(token))
        if id == self.unk:
            raise DataError(
                f"tokenizer: has no {token} token; train it with glm_core.data.tokenizer.train"
            )
        return id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens. Raises DataError if `text` is not
        valid Unicode."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise DataError("text: holds half a surrogate pair; pass valid Unicode") from None
        first, *rest = self._processor.encode(raw.split(SPACE.encode()))
        ids = list(first)
        for part in rest:
            ids += self._space + part
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Special tokens give nothing; bytes that are not UTF-8, and
        unknown ids, give U+FFFD."""
        return str(
            self._processor.decode([i if 0 <= i < self.vocab else self.unk for i in map(int, ids)])
        )


def load(corpus: Corpus, vocab: int, cache_dir: Path) -> Tokenizer:
    """Returns the tokenizer of this corpus and vocabulary, trained on first use and then read from
    `cache_dir`."""
    version = sentencepiece.__version__
    key = cache.digest([corpus.sha256, str(vocab), str(TRAINING_CHARS), version, *SPECIAL.values()])
    path = cache_dir / f"tokenizer-{key[:16]}.model"
    cache.once(path, lambda: train(corpus.documents, vocab))
    try:
        return Tokenizer(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from None


def train(documents: Sequence[str], vocab: int) -> bytes:
    """Returns a sentencepiece model of at most `vocab` tokens; the same documents give the same
    bytes."""
    if vocab < MIN_VOCAB:
        raise DataError(
            f"data.vocab={vocab}: no room for bytes and special tokens; use at least {MIN_VOCAB}"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(documents, vocab)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=list(SPECIAL.values()),
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_surface="\ufffd",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,  # the number is written into the model and must not vary by machine
        minloglevel=2,
    )
    return model.getvalue()


def lines(documents: Sequence[str], vocab: int) -> list[str]:
    """Returns the training text: every k-th line of at most LINE_CHARS characters, with k such that
    about TRAINING_CHARS remain. Lines are cut at characters too rare for this vocabulary, which are
    left to the bytes."""
    stride = -(-sum(map(len, documents)) // TRAINING_CHARS)
    chosen = [line for number, line in enumerate(split(documents)) if number % stride == 0]
    counts = Counter("".join(chosen))
    counts.pop(SPACE, None)
    common = {char for char, _ in counts.most_common((vocab - 256) // 2)}
    rare = dict.fromkeys((ord(char) for char in counts if char not in common), "\n")
    rare[ord(SPACE)] = "\n"
    return [part for line in chosen for part in line.translate(rare).split("\n") if part]


def split(documents: Sequence[str]) -> Iterator[str]:
    """Yields lines, long ones in parts of LINE_CHARS."""
    for document in documents:
        for line in document.split("\n"):
            yield from (line[i : i + LINE_CHARS] for i in range(0, len(line), LINE_CHARS))
