"""Text to batches: `open(config, seed, cache_dir)` gives a Sampler; `sampler.next(micro_batch)` a
Batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_core.config import DataConfig
from glm_core.data import cache, corpus, tokenizer
from glm_core.data.corpus import Corpus
from glm_core.data.sampler import Batch, Sampler
from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import DataError

__all__ = ["Batch", "Sampler", "Tokenizer", "open"]


def open(
    config: DataConfig,
    seed: int,
    cache_dir: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    positions: str = "rope",
    pieces: Tokenizer | None = None,
) -> Sampler:
    """The sampler over `config`'s text; corpus, tokenizer and ids are kept in `cache_dir` for the
    next time.

    rank, world: the data-parallel slice. positions: the model's (`ModelConfig.positions`); with
    "rope", row 0 runs on through [gMASK] targets, with the two-row kinds it stays at the blank.
    pieces: a tokenizer in place of the text's own. `sampler.corpus` says, JSON-able, where the text
    comes from: sha256, parts (characters), missing (reasons), documents, tokens. Raises
    DataError."""
    folder = Path(cache_dir).expanduser()
    text = corpus.load(config, folder)
    pieces = pieces or tokenizer.load(text, config.vocab, folder)
    ids = encoded(text, pieces, folder)
    num_tokens = len(ids) - len(text.documents)
    if num_tokens < config.length:
        raise DataError(
            f"corpus: {num_tokens} tokens, data.length={config.length} needs at least as many; "
            "give more text or a smaller data.length"
        )
    about = {
        "sha256": text.sha256,
        "parts": text.parts,
        "missing": text.missing,
        "documents": len(text.documents),
        "tokens": num_tokens,
    }
    return Sampler(
        ids, config, pieces, about, seed, rank, world, gmask_continues=positions == "rope"
    )


def encoded(text: Corpus, pieces: Tokenizer, folder: Path) -> NDArray[np.int32]:
    """All documents' ids with <eod> after each, read from disk as they are needed."""
    path = folder / f"tokens-{cache.digest([text.sha256, pieces.sha256])[:16]}.npy"

    def encode() -> bytes:
        documents = [np.array([*pieces.encode(d), pieces.eod], np.int32) for d in text.documents]
        file = io.BytesIO()
        np.save(file, np.concatenate(documents))
        return file.getvalue()

    cache.once(path, encode)
    try:
        ids: NDArray[np.int32] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from None
    return ids
