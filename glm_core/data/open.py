"""Opens a corpus for training: text, tokenizer and token ids, cached on disk, become a Sampler."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_core.config import DataConfig
from glm_core.data import cache, corpus
from glm_core.data import tokenizer as tokenizers
from glm_core.data.corpus import Corpus
from glm_core.data.sampler import Sampler
from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import DataError


def open_sampler(
    config: DataConfig,
    seed: int,
    cache_dir: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    positions: str = "rope",
    tokenizer: Tokenizer | None = None,
) -> Sampler:
    """Returns the sampler over `config`'s text. Corpus, tokenizer and ids are cached in
    `cache_dir`.

    rank, world: the data-parallel slice. positions: the model's kind (`ModelConfig.positions`).
    With "rope", row 0 of the positions runs on through the targets of a [gMASK]; with the two-row
    kinds it stays at the blank. tokenizer: replaces the tokenizer that is otherwise trained
    on the text. `sampler.corpus` is a JSON-able record of the text: sha256, parts (characters),
    missing (reasons), documents, tokens. Raises DataError."""
    folder = Path(cache_dir).expanduser()
    text = corpus.load(config, folder)
    tokenizer = tokenizer or tokenizers.load(text, config.vocab, folder)
    ids = token_ids(text, tokenizer, folder)
    num_tokens = len(ids) - len(text.documents)
    if num_tokens < config.length:
        raise DataError(
            f"corpus: {num_tokens} tokens, data.length={config.length} needs at least as many; "
            "give more text or a smaller data.length"
        )
    facts = {
        "sha256": text.sha256,
        "parts": text.parts,
        "missing": text.missing,
        "documents": len(text.documents),
        "tokens": num_tokens,
    }
    return Sampler(
        ids, config, tokenizer, facts, seed, rank, world, gmask_continues=positions == "rope"
    )


def token_ids(text: Corpus, tokenizer: Tokenizer, folder: Path) -> NDArray[np.int32]:
    """Returns the ids of all documents, <eod> after each, memory-mapped from a file in
    `folder`."""
    path = folder / f"tokens-{cache.digest([text.sha256, tokenizer.sha256])[:16]}.npy"

    def encode() -> bytes:
        documents = [
            np.array([*tokenizer.encode(d), tokenizer.eod], np.int32) for d in text.documents
        ]
        file = io.BytesIO()
        np.save(file, np.concatenate(documents))
        return file.getvalue()

    cache.once(path, encode)
    try:
        ids: NDArray[np.int32] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from None
    return ids
