"""A chat template gives the token ids of transformers' apply_chat_template, for every template of
the GLM family and for those of other families; where one raises, so does the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import GLM, OTHERS
from folders import TEXT

from glm_core.errors import PromptError
from glm_core.pretrained import templates
from glm_core.pretrained.templates import ChatTemplate, Message, find_template
from glm_core.pretrained.tokenizers import FastTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

OURS = {
    "ours-glm4": templates.GLM4,
    "ours-glm3": templates.CHATGLM3,
    "ours-glm2": templates.CHATGLM2,
}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>")
SPECIAL = ("<s>", "</s>", "<pad>", "[gMASK]", "sop", "<sop>", *ROLES, *HEADERS, "<end_of_turn>")
MORE = ("<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|channel|>")
THOUGHT = "<think>it {runs}</think>\n\n the fox\n"
TALKS = {
    "question": [("user", "who runs?")],
    "system": [("system", "Be brief."), ("user", " who\n\nruns? \n")],
    "turns": [("user", "who?"), ("assistant", '  the "fox" <b>&\'\n'), ("user", "你好 'again'")],
    "thought": [("user", "a</think>b"), ("assistant", THOUGHT), ("user", "so?")],
    "all": [("system", "S"), ("user", "1"), ("assistant", THOUGHT), ("user", "2\\n{{ 1 }}")],
    "empty": [("system", ""), ("user", "a"), ("assistant", ""), ("user", "b")],
    "twice": [("user", "a"), ("user", "b")],
    "reply": [("user", "a"), ("assistant", "b  ")],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FastTokenizer, Path]:
    """Returns one tokenizer twice, as transformers' and as ours, and its folder."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 9, trainer)
    made.add_special_tokens([*SPECIAL, *MORE])
    blanks = tokenizers.AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)
    made.add_special_tokens([blanks])  # takes in the blanks around it, as Phi-3's tokens do
    made.add_tokens(["<think>", "</think>"])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(folder)
    return theirs, FastTokenizer(folder / "tokenizer.json"), folder


@pytest.mark.parametrize("name", [*GLM, *OURS, *OTHERS])
def test_ids_of_transformers(both: Any, name: str) -> None:
    theirs, tokenizer, folder = both
    source = {**GLM, **OURS, **OTHERS}[name]
    template = ChatTemplate(source=source, constants=find_template(folder, tokenizer).constants)
    for talk, turns in TALKS.items():
        messages = [Message(*turn) for turn in turns]
        wanted = ids_or_refusal(theirs, source, messages)
        if isinstance(wanted, str):
            with pytest.raises(PromptError, match=re.escape(wanted)):
                template.prompt_ids(messages, tokenizer)
        else:
            assert template.prompt_ids(messages, tokenizer) == wanted, talk


def ids_or_refusal(theirs: Any, source: str, messages: list[Message]) -> list[int] | str:
    """Returns the ids of transformers, or what the template says where it raises."""
    dicts = [m.values for m in messages]
    try:
        ids: list[int] = theirs.apply_chat_template(
            dicts, chat_template=source, add_generation_prompt=True
        )["input_ids"]
    except jinja2.TemplateError as error:
        return str(error)
    return ids


def test_the_template_of_a_folder(both: Any) -> None:
    """The folder's own files are read as transformers reads them."""
    theirs, tokenizer, folder = both
    theirs.chat_template = OTHERS["llama-2"]
    theirs.save_pretrained(folder)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [Message("user", "who runs?")]
    wanted = again.apply_chat_template([m.values for m in messages])["input_ids"]
    assert find_template(folder, tokenizer).prompt_ids(messages, tokenizer) == wanted
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {"content": "</s>", "lstrip": False, "special": True, "__type": "AddedToken"}
    config |= {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    again = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = again.apply_chat_template([m.values for m in messages])["input_ids"]
    assert find_template(folder, tokenizer).prompt_ids(messages, tokenizer) == wanted
    assert wanted == [tokenizer.special["</s>"]] * 2


TOOL = {"type": "function", "function": {"name": "roots", "parameters": {"type": "object"}}}
CALLED = [
    Message("system", "Be exact."),
    Message("user", "Solve it."),
    Message("assistant", '{"coefficients": [1, 0, -2]}', "roots"),
    Message("observation", "[-sqrt(2), sqrt(2)]"),
]


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "glm-4-0414"])
def test_tools_as_transformers_shows_them(both: Any, name: str) -> None:
    """GLM-4-9b-chat reads tools from a message, GLM-4-0414 from its own variable."""
    theirs, tokenizer, folder = both
    template = ChatTemplate(source=GLM[name], constants=find_template(folder, tokenizer).constants)
    shown: list[dict[str, Any]] = [m.values for m in CALLED]
    settings: dict[str, Any] = {"tools": [TOOL]}
    if name == "glm-4-9b-chat":
        shown, settings = [{"role": "system", "content": "", "tools": [TOOL]}, *shown], {}
    wanted = theirs.apply_chat_template(
        shown, chat_template=GLM[name], add_generation_prompt=True, return_dict=False, **settings
    )
    assert template.prompt_ids(CALLED, tokenizer, [TOOL]) == wanted
    assert "roots" in (text := theirs.decode(wanted))
    assert "parameters" in text
