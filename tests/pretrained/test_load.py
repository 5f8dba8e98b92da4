"""Checkpoints of transformers with their tokenizers give the prompts and replies of transformers;
bad folders are refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import TALK, TEXT, loud, sentences, stored

from glm_core import cli
from glm_core.errors import CheckpointError, DataError, PromptError
from glm_core.model.generate import generate
from glm_core.model.sample import Sampling
from glm_core.pretrained.chat_model import CausalModel
from glm_core.pretrained.load import from_path
from glm_core.pretrained.templates import Message

SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>\n"
    "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% endif %}"
)
GREEDY = Sampling(max_tokens=12, temperature=0)
# --- transformers' Glm and Glm4 ------------------------------------------------------------------


@pytest.fixture(params=["glm", "glm4"])
def published(request: Any, tmp_path: Path) -> tuple[Path, Any, Any]:
    """Returns (folder, model, tokenizer), saved by transformers itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = tokenizer_json()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=SPECIAL[1:],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
    )
    name = {"glm": "Glm", "glm4": "Glm4"}[request.param]
    ids = fast.convert_tokens_to_ids([SPECIAL[0], "<|user|>", "<|observation|>"])
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 384,
        "max_position_embeddings": 128,
        "eos_token_id": ids,
        "pad_token_id": ids[0],
        "attention_bias": True,
    }
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes)
    ).eval()
    loud(model.named_parameters())
    folder = tmp_path / name
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder, model, fast


def tokenizer_json() -> Any:
    """Returns a byte-level BPE that puts [gMASK]<sop> before every text, as GLM-4's does."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    front = [(n, tokenizer.token_to_id(n)) for n in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=front
    )
    return tokenizer


def test_a_suffix_follows_the_text(published: tuple[Path, Any, Any]) -> None:
    """What a post-processor puts behind a text comes behind it, as transformers encodes."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder, _, fast = published
    names = ("[gMASK]", "<sop>", SPECIAL[0])
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"[gMASK] <sop> $A {SPECIAL[0]}",
        special_tokens=[(n, fast.convert_tokens_to_ids(n)) for n in names],
    )
    fast.save_pretrained(folder)
    chat_model = from_path(folder)
    for text in ("The fox", "你好"):
        assert list(chat_model.completion_prompt(text).tokens) == fast(text).input_ids


def test_tokens_of_transformers(published: tuple[Path, Any, Any]) -> None:
    """Prompts, stop tokens and greedy replies are equal; a stop token ends a reply early."""
    folder, model, fast = published
    chat_model = from_path(folder)
    assert isinstance(chat_model, CausalModel)
    text = "The fox <b> 你好"
    prompts = [
        chat_model.completion_prompt(text),
        chat_model.chat_prompt([*TALK[:3], Message("user", "again, 你好?")]),
    ]
    messages = [m.values for m in [*TALK[:3], Message("user", "again, 你好?")]]
    rendered = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    wanted = [fast(text).input_ids, fast(rendered, add_special_tokens=False).input_ids]
    assert [list(p.tokens) for p in prompts] == wanted
    stop = list(chat_model.stop)
    assert stop == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    for prompt in prompts:
        reply = greedy(model, prompt.tokens, stop)
        ours = generate(
            chat_model.model, [prompt], dataclasses.replace(GREEDY, stop=chat_model.stop)
        )[0]
        assert ours.tokens == reply
        assert len(set(reply)) > 3
        assert chat_model.tokenizer.decode(reply) == fast.decode(reply, skip_special_tokens=True)
    end = reply[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    again = from_path(folder)
    assert again.stop == (end,)
    cut = generate(again.model, [prompts[1]], dataclasses.replace(GREEDY, stop=again.stop))[0]
    assert cut.tokens == greedy(model, prompts[1].tokens, [end]) == reply[: reply.index(end)]
    assert cut.finish == "stop"


def greedy(model: Any, prompt: Any, stop: list[int]) -> list[int]:
    """Returns the reply of transformers' generate, without the stop token."""
    ids = torch.tensor([list(prompt)])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(generated) if token in stop]
    return generated[: ends[0]] if ends else generated


def test_messages_stay_text(published: tuple[Path, Any, Any]) -> None:
    """A special token that a message or a prompt spells is encoded as text."""
    chat_model = from_path(published[0])
    roles = chat_model.tokenizer.special
    tokens = chat_model.chat_prompt(TALK).tokens
    assert [t for t in tokens if t in roles.values()] == [
        roles[n]
        for n in (
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|user|>",
            "<|assistant|>",
        )
    ]
    assert "<|user|> again, 你好?" in chat_model.tokenizer.decode(tokens)
    assert roles["<|user|>"] not in chat_model.completion_prompt("<|user|>").tokens[2:]


def test_commands_take_a_checkpoint(
    published: tuple[Path, Any, Any], capsys: Any, monkeypatch: Any
) -> None:
    folder, _, _ = published
    assert cli.main(["generate", "--model", str(folder), "--prompt", "[MASK] fox", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("who runs?\nagain\n/quit\n"))
    assert cli.main(["chat", "--model", str(folder), "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_chat_template_file_is_preferred(published: tuple[Path, Any, Any]) -> None:
    folder, _, _ = published
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}!{% endfor %}"
    )
    chat_model = from_path(folder)
    prompt = chat_model.tokenizer.decode(chat_model.chat_prompt([Message("user", "hello")]).tokens)
    assert prompt == "hello!"
    (folder / "chat_template.jinja").write_text("{% for m in")
    with pytest.raises(PromptError, match="chat template: "):
        from_path(folder).chat_prompt([Message("user", "hello")])


# --- bad input -----------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "their"
    stored(folder, "chatglm2")
    with pytest.raises(DataError, match=r"no tokenizer for layout chatglm2; known: tokenizer.json"):
        from_path(folder)
    for data in (b"not pieces", b""):
        (folder / "tokenizer.model").write_bytes(data)
        with pytest.raises(DataError, match=r"neither a sentencepiece model .* nor tiktoken's"):
            from_path(folder)
    (folder / "tokenizer.model").write_bytes(sentences([]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}')
    with pytest.raises(DataError, match="eos_token_id holds '</s>'"):
        from_path(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config.json: cannot be read"):
        from_path(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"not a tokenizer.json .*; fetch it again"):
        from_path(folder)
    small = tmp_path / "small"
    stored(small, "chatglm2", vocab=90)
    (small / "tokenizer.model").write_bytes(sentences([]))
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model 90"):
        from_path(small)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        from_path(tmp_path / "nowhere")
