"""Writes small random checkpoints with tokenizers, in their authors' exact layouts."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import foreign
import sentencepiece
import torch
from safetensors.torch import save_file

from glm_core.model.glm import GLM
from glm_core.pretrained.templates import Message

TEXT = "The quick brown fox jumps over the lazy dog. 你好，世界 again and again it runs.\n"
TALK = [
    Message("system", "Be brief."),
    Message("user", "who runs?"),
    Message("assistant", "the fox"),
    Message("user", "<|user|> again, 你好?"),
]


CHATGLM3_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n "
    "{{ message['content'] }}{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""the template in tokenizer_config.json of chatglm3-6b"""


def loud(parameters: Any) -> None:
    """Sets random values whose logits differ enough for every choice to be clear."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in parameters:
            std = 0.05 if p.ndim == 1 else 1.5 * p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=g) * std + ("norm" in name and p.ndim == 1))


def sentences(symbols: list[str], **more: Any) -> bytes:
    """Returns a sentencepiece model."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=made,
        model_type="bpe",
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        user_defined_symbols=symbols,
        **more,
    )
    return made.getvalue()


def stored(folder: Path, name: str, vocab: int = 400) -> GLM:
    """Writes a random model in a layout, without a tokenizer, and returns it."""
    folder.mkdir()
    sizes = {"vocab": vocab, "max_length": 200}
    model = GLM(dataclasses.replace(foreign.CONFIGS[name], **sizes))
    loud(model.named_parameters())
    state = foreign.STATES[name]({k: v.detach() for k, v in model.named_parameters()})
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    theirs = {
        **foreign.DESCRIPTIONS[name],
        "eos_token_id": 2,
        **(
            {"padded_vocab_size": vocab, "seq_length": 200}
            if name == "chatglm2"
            else {"vocab_size": vocab, "max_sequence_length": 200}
        ),
    }
    (folder / "config.json").write_text(json.dumps(theirs))
    return model


def chatglm3(folder: Path) -> Path:
    """Writes a folder of ChatGLM3 with random weights, tokenizer and template, and returns it."""
    stored(folder, "chatglm2")
    (folder / "tokenizer.model").write_bytes(sentences([]))
    facts = {"chat_template": CHATGLM3_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder
