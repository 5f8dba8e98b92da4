"""Tokenizers and chat prompts of ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM-4 agree id by id with their
authors' code."""

from __future__ import annotations

import base64
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from folders import CHATGLM3_TEMPLATE, TALK, TEXT, sentences, stored

from glm_core.errors import DataError
from glm_core.model.generate import generate
from glm_core.model.sample import Sampling
from glm_core.pretrained.chat_model import BlankFillingModel
from glm_core.pretrained.load import from_path
from glm_core.pretrained.templates import Message
from glm_core.pretrained.tokenizers import GLM4_PATTERN, ChatGLM6BTokenizer, GLM4Tokenizer

GREEDY = Sampling(max_tokens=12, temperature=0)
GLM4_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n..."
    "{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""glm-4-9b-chat, tokenizer_config.json, what it says of tools left out"""
NUM_RANKS = 310
CHATGLM2 = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


# --- ChatGLM2 and ChatGLM3: sentencepiece --------------------------------------------------------


def family(folder: Path, **facts: Any) -> sentencepiece.SentencePieceProcessor:
    """Writes a folder of ChatGLM2 or 3; returns the processor that its authors' code encodes
    with."""
    stored(folder, "chatglm2")
    data = sentences([])
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"a": "b"}, **facts})
    )
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def test_chatglm2(tmp_path: Path) -> None:
    """A conversation is encoded as one text."""
    plain = family(tmp_path / "their")
    chat_model = from_path(tmp_path / "their")
    size = plain.vocab_size()
    text = "[Round 1]\n\n问：who runs?\n\n答：the fox\n\n"
    text += "[Round 2]\n\n问：<|user|> again, 你好?\n\n答："
    prefix = [size + CHATGLM2.index("[gMASK]"), size + CHATGLM2.index("sop")]
    assert list(chat_model.chat_prompt(TALK[1:]).tokens) == [*prefix, *plain.encode(text)]
    assert list(chat_model.completion_prompt("the fox").tokens) == [
        *prefix,
        *plain.encode("the fox"),
    ]
    assert chat_model.reply_ids([*TALK, Message("assistant", "a\n")]) == plain.encode("a\n")
    assert chat_model.stop == (2,)
    assert generate(chat_model.model, [chat_model.completion_prompt("the fox")], GREEDY)[0].tokens


def listed(size: int, names: list[str]) -> dict[str, Any]:
    """Returns an added_tokens_decoder with some of ChatGLM3's tokens and one of sentencepiece's."""
    ids = {name: size + i for i, name in enumerate(CHATGLM2 + ROLES)}
    return {"2": {"content": "</s>"}, **{str(ids[n]): {"content": n} for n in names}}


@pytest.mark.parametrize("source", ["list", "part of it and a template", "template", "code"])
def test_chatglm3(source: str, tmp_path: Path) -> None:
    """Wherever the files name the roles: each message follows its role and a newline, and is
    encoded alone (tokenization_chatglm.py, build_single_message)."""
    folder = tmp_path / "their"
    size = sentencepiece.SentencePieceProcessor(model_proto=sentences([])).vocab_size()
    facts: dict[str, Any] = {
        "list": {"added_tokens_decoder": listed(size, CHATGLM2 + ROLES)},
        "part of it and a template": {
            "added_tokens_decoder": listed(size, ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]),
            "chat_template": CHATGLM3_TEMPLATE,
        },
        "template": {"chat_template": CHATGLM3_TEMPLATE},
        "code": {},
    }[source]
    plain = family(folder, **facts)
    if source == "code":
        (folder / "tokenization_chatglm.py").write_text('raise SystemExit("<|user|>")')
    chat_model = from_path(folder)
    ids = {name: size + i for i, name in enumerate(CHATGLM2 + ROLES)}
    assert chat_model.tokenizer.special == ids
    expected = [ids["[gMASK]"], ids["sop"]]
    messages = [*TALK, Message("assistant", "\n well"), Message("user", "  two blanks")]
    for m in messages:
        expected += [ids[f"<|{m.role}|>"], *plain.encode("\n"), *plain.encode(m.content)]
    assert list(chat_model.chat_prompt(messages).tokens) == [*expected, ids["<|assistant|>"]]
    conversation = [*messages, Message("assistant", "the fox")]
    assert chat_model.reply_ids(conversation) == [*plain.encode("\n"), *plain.encode("the fox")]
    assert chat_model.stop == (2, ids["<|user|>"], ids["<|observation|>"])


# --- ChatGLM-6B ----------------------------------------------------------------------------------


def test_chatglm_6b(tmp_path: Path) -> None:
    """Newlines and runs of blanks are tokens; ids begin after those of images."""
    folder = tmp_path / "their"
    stored(folder, "chatglm-6b", vocab=420)
    blanks = [f"<|blank_{i}|>" for i in range(2, 7)]
    symbols = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<n>", "<|tab|>", *blanks]
    data = sentences(symbols)
    (folder / "ice_text.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 20}))
    chat_model = from_path(folder)
    plain = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = chat_model.tokenizer
    assert isinstance(tokenizer, ChatGLM6BTokenizer)
    text = "the fox\n\tjumps    over"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    spelled = "the fox<n><|tab|>jumps<|blank_4|>over"
    assert ids == [i + 20 for i in plain.encode(spelled)]
    assert {plain.piece_to_id(x) + 20 for x in ("<n>", "<|tab|>", "<|blank_4|>")} <= set(ids)
    written = "a [gMASK] <eop><sop>b"  # special tokens in a message stay text
    tokens_of_text = chat_model.chat_prompt([Message("user", written)]).tokens
    assert tokenizer.decode(tokens_of_text) == written
    special = {
        tokenizer.mask,
        tokenizer.gmask,
        tokenizer.smask,
        tokenizer.sop,
        tokenizer.eop,
        tokenizer.eos,
    }
    assert [t for t in tokens_of_text if t in special] == [tokenizer.gmask, tokenizer.sop]
    prompt = chat_model.chat_prompt([Message("user", "the fox")])
    assert list(prompt.tokens) == [*tokenizer.encode("the fox"), tokenizer.gmask, tokenizer.sop]
    assert (prompt.sep, prompt.mask) == (len(prompt.tokens) - 1, len(prompt.tokens) - 2)
    assert (type(chat_model), chat_model.stop) == (BlankFillingModel, (2,))
    text = "[Round 0]\n问：who runs?\n答：the fox\n[Round 1]\n问：<|user|> again, 你好?\n答："
    tokens = chat_model.chat_prompt(TALK[1:]).tokens
    assert list(tokens) == [*tokenizer.encode(text), tokenizer.gmask, tokenizer.sop]
    assert generate(chat_model.model, [prompt], GREEDY)[0].tokens


# --- GLM-4: tiktoken's file ----------------------------------------------------------------------


def ranks(size: int) -> dict[bytes, int]:
    """Returns byte pairs of TEXT, the most frequent first, merged within the words of GLM-4's
    pattern."""
    regex = pytest.importorskip("regex", reason="regex, which tiktoken brings, is not installed")
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(GLM4_PATTERN, TEXT * 3)]
    found = {bytes([b]): b for b in range(256)}
    while len(found) < size:
        pairs = Counter(p for w in words for p in itertools.pairwise(w))
        best = max(pairs, key=lambda p: (pairs[p], p))
        found.setdefault(b"".join(best), len(found))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [b"".join(best)]
                i += 1
    return found


def glm4(folder: Path, facts: dict[str, Any]) -> Path:
    """Writes a folder of GLM-4; returns the tokenizer's file."""
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    stored(folder, "chatglm2")
    lines = [f"{base64.b64encode(t).decode()} {i}" for t, i in ranks(NUM_RANKS).items()]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder / "tokenizer.model"


@pytest.mark.parametrize("source", ["list and template", "nothing"])
def test_glm4(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of text equal those of transformers' converter of tiktoken files, ids of a conversation
    those of the authors' build_single_message."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    slow = pytest.importorskip(
        "transformers.convert_slow_tokenizer", reason="transformers is not installed"
    )
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
    ids = {name: NUM_RANKS + i for i, name in enumerate(names)}
    facts: dict[str, Any] = {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": {"a": "b"}}
    if source != "nothing":
        facts["added_tokens_decoder"] = {str(i): {"content": n} for n, i in ids.items()}
        facts["chat_template"] = GLM4_TEMPLATE
    file = glm4(tmp_path / "their", facts)
    chat_model = from_path(tmp_path / "their")
    tokenizer = chat_model.tokenizer
    assert isinstance(tokenizer, GLM4Tokenizer)
    assert ids.items() <= tokenizer.special.items()
    converted = slow.TikTokenConverter(str(file)).converted()
    for text in (
        TEXT,
        "it's 12345 foxes\r\n\n  and\ttabs ",
        "你好🙂世界 é",
        "<|user|> [gMASK]",
        " ",
    ):
        assert tokenizer.encode(text) == converted.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([ids["<|user|>"], *tokenizer.encode("a"), 10**6]) == "a"
    expected = [ids["[gMASK]"], ids["<sop>"]]
    for m in TALK:
        expected += [ids[f"<|{m.role}|>"], *tokenizer.encode("\n"), *tokenizer.encode(m.content)]
    assert list(chat_model.chat_prompt(TALK).tokens) == [*expected, ids["<|assistant|>"]]
    conversation = [*TALK, Message("assistant", "the fox")]
    assert chat_model.reply_ids(conversation) == [
        *tokenizer.encode("\n"),
        *tokenizer.encode("the fox"),
    ]
    assert generate(chat_model.model, [chat_model.chat_prompt(TALK)], GREEDY)[0].tokens


# --- bad input -----------------------------------------------------------------------------------


def test_bad_tiktoken_files(tmp_path: Path) -> None:
    file = glm4(tmp_path / "their", {})
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for data, message in [
        (b"".join(lines[:-1]) + b"!!! 309\n", "not a tiktoken file"),
        (b"".join(lines[:100]), "100 lines are not ranks from 0 on that cover every byte"),
        (b"".join(lines[:290] + lines[300:]), "300 lines are not ranks"),
        (whole + b"IQ==\n", "not a tiktoken file"),
    ]:
        file.write_bytes(data)
        with pytest.raises(DataError, match=message):
            from_path(tmp_path / "their")
    file.write_bytes(whole)
    for listed, message in [
        ({"311": {"content": "[gMASK]"}}, "added_tokens_decoder lists no token <sop>"),
        ({"x": {}}, "added_tokens_decoder cannot be read"),
        ({"311": {"content": "[gMASK]"}, "0311": {"content": "<sop>"}}, "two special tokens have"),
    ]:
        facts = {"added_tokens_decoder": listed}
        (tmp_path / "their/tokenizer_config.json").write_text(json.dumps(facts))
        with pytest.raises(DataError, match=message):
            from_path(tmp_path / "their")


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "their"
    family(folder, tokenizer_class="OddTokenizer")
    (folder / "tokenization_chatglm.py").write_text('raise SystemExit("ran")')
    message = r"its tokenizer OddTokenizer is Python code in the folder, which is never run; known"
    with pytest.raises(DataError, match=message):
        from_path(folder)
