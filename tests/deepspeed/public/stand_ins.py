"""Stands in for what public scripts import and need not have here: data sets, loggers, a GPU. Each
function is called before the script runs."""

import sys
import types
from typing import Any

import torch


def module(name: str, **names: Any) -> types.ModuleType:
    """Adds a module with these names; unless `alone` is one of them, the packages above it too."""
    made = types.ModuleType(name)
    made.__dict__.update(names)
    made.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = made
    head, _, tail = name.rpartition(".")
    if head and "alone" not in names:
        parent = sys.modules.get(head) or module(head)
        setattr(parent, tail, made)
    return made


class Quiet:
    """Accepts any call, and returns itself."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


class Rows(list):  # type: ignore[type-arg]
    """A data set of dicts, as the `datasets` package has it."""

    def filter(self, keep: Any) -> Any:
        return Rows(row for row in self if keep(row))

    def map(self, change: Any) -> Any:
        return Rows(change(row) for row in self)


class Words:
    """A tokenizer of letters."""

    bos_token_id, pad_token_id, eos_token_id, mask_token_id = all_special_ids = [0, 1, 2, 3]
    vocab_size = 50265

    @staticmethod
    def from_pretrained(name: str) -> Any:
        return Words()

    def encode(self, text: str, max_length: int, **_: Any) -> list[int]:
        return [4 + ord(letter) % 60 for letter in text][:max_length]


def no_gpu() -> None:
    """Makes calls of torch.cuda and `.cuda()` do nothing, and its types those of the CPU."""
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    calls = {
        "set_device": None,
        "synchronize": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "reset_peak_memory_stats": None,
        "current_device": "cpu",
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "device_count": 2,
    }
    for name, value in calls.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.get_rng_state = torch.get_rng_state  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.LongTensor = torch.LongTensor  # type: ignore[misc,assignment]
