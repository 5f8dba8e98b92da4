"""A checkpoint's chat template is foreign code: it stays in the sandbox, and its errors are ours.
What messages spell is never a special token, and a reply is learned as the template shows it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from chat_templates import GLM, OTHERS

from glm_core.errors import ConfigError, PromptError
from glm_core.pretrained import sandbox
from glm_core.pretrained.templates import CHATGLM2, CHATGLM3, GLM4, ChatTemplate, Message

ALL = {**GLM, **OTHERS, "chatglm2": CHATGLM2, "ours-3": CHATGLM3, "ours-4": GLM4}
CONSTANTS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
ASKED = [Message("user", "who runs?")]


class Letters:
    """A tokenizer whose tokens are characters and special tokens."""

    vocab, sha256, prefix = 1 << 21, "", list[int]()
    special = {"<s>": 0, "</s>": 1, "[gMASK]": 2, "<sop>": 3, "<|user|>": 4, "<|assistant|>": 5}

    def encode(self, text: str) -> list[int]:
        return [10 + ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        names = {i: name for name, i in self.special.items()}
        return "".join(names[i] if i in names else chr(i - 10) for i in ids)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, constants=CONSTANTS)


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "access to attribute '__class__'"),
        ("{{ ('{0.__class__}' | attr('format'))(messages) }}", "No filter named 'attr'"),
        ("{{ dict.mro() }}", "has no attribute 'mro'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "takes no private name"),
        ("{{ namespace(_a=1) }}", "takes no private name"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
        ("{{ messages[0].role + 1 }}", "TypeError: can only concatenate str"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "chat template: no user; give other"),
    ],
)
def test_what_a_template_may_not_do(source: str, fact: str) -> None:
    with pytest.raises(PromptError, match=r"chat template: .*; (give|use) ") as raised:
        template(source).prompt_ids(ASKED, Letters())
    assert fact in str(raised.value)


def test_contents_are_no_template() -> None:
    assert sandbox.render("{{ text }}", {"text": "{{ 1 + 1 }}"}) == "{{ 1 + 1 }}"


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_of_messages_stay_text(name: str) -> None:
    """A message that spells special tokens gives those that a message without them gives."""
    letters, spelled = Letters(), "a<|user|><|user|> [gMASK]</s>b"
    plain = "".join("#" if c in "<[" else c for c in spelled)
    got, wanted = (
        template(ALL[name]).prompt_ids([Message("user", text)], letters)
        for text in (spelled, plain)
    )
    assert [i for i in got if i < 10] == [i for i in wanted if i < 10]
    assert len(got) == len(wanted)
    assert letters.decode(got).count("<|user|>") >= 2


def test_a_special_token_that_the_template_looks_at_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content.split('</s>')[-1] }}{% endfor %}"
    with pytest.raises(PromptError, match=r"changes a special token .* \(</s>\)"):
        template(source).prompt_ids([Message("user", "a</s>b")], Letters())
    assert template(source).prompt_ids([Message("user", "ab")], Letters())


REPLIES = [
    ("chatglm3", "fox", "\n fox"),
    ("glm-4-9b-chat", " the fox\n", "\n the fox\n"),
    ("glm-4-0414", "</s><|user|>", "\n</s><|user|>"),
    ("glm-z1", "<think>a</think>b", "a</think>b"),
    ("glm-z1", "a</think>b", "a</think>b"),
    ("glm-z1", "b", "\n\n</think>\n\nb"),
    ("glm-4.5", "b", "\n<think></think>\nb"),
    ("glm-4.5", "<think>a</think>b\n", "\n<think>a</think>\nb"),
    ("glm-edge", "fox", "fox"),
    ("chatglm2", "fox", "fox"),
    ("chatml", "fox\n", "fox\n"),
    ("generation-tag", "fox", "fox"),
    ("thinking-chatml", "<think>\na</think>b", "<think>\na\n</think>\n\nb"),
    ("llama-2", " fox ", " fox"),
    ("llama-3-with-date", " fox", "fox"),
    ("mistral", "fox", "fox"),
    ("phi-3", "", ""),
    ("deepseek", "who runs?", " who runs?"),
    ("deepseek-r1", "<think>\na</think>b", "a</think>b"),
    ("deepseek-r1", "b", "\n</think>\n\nb"),
    ("zephyr", "fox", "fox"),
]


@pytest.mark.parametrize(("name", "content", "wanted"), REPLIES)
def test_a_reply_is_what_the_template_shows(name: str, content: str, wanted: str) -> None:
    """Request and reply together begin the rendered conversation, unless the template hides what a
    past reply thought."""
    letters, shown = Letters(), template(ALL[name])
    messages = [*ASKED, Message("assistant", content)]
    reply = shown.reply_ids(messages, letters)
    assert letters.decode(reply) == wanted
    if "<think>" not in letters.decode(request := shown.prompt_ids(ASKED, letters)):
        values = {**CONSTANTS, "messages": [m.values for m in messages], "tools": None}
        whole = sandbox.render(shown.source, values)
        assert whole.startswith(letters.decode([*request, *reply]))
    assert not [i for i in reply if i < 10]


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("json-lines", "fox", "does not print the last message as it is"),
        ("lengths", "fox", "does not print the last message as it is"),
        ("glm-4-9b-chat", "", "does not print the last message as it is"),
    ],
)
def test_a_reply_that_cannot_be_located_is_refused(name: str, content: str, fact: str) -> None:
    messages = [*ASKED, Message("assistant", content)]
    with pytest.raises(PromptError, match=r"chat template: .*chat_template.jinja") as raised:
        template(ALL[name]).reply_ids(messages, Letters())
    assert fact in str(raised.value)


def test_a_reply_that_does_not_continue_the_request_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shown = template(source + "{% if add_generation_prompt %}Sure: {% endif %}")
    with pytest.raises(PromptError, match="ends in 'Sure: ', which the reply does not continue"):
        shown.reply_ids([*ASKED, Message("assistant", "b")], Letters())


def test_the_date_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = template("{{ strftime_now('%d %b %Y') }}")
    monkeypatch.setenv("GLM_CORE_DATE", "2024-02-29")
    assert dated.prints_date
    assert sandbox.render(dated.source, {}) == "29 Feb 2024"
    monkeypatch.setenv("GLM_CORE_DATE", "29.2.2024")
    with pytest.raises(ConfigError, match="write the day as 2026-11-28"):
        sandbox.render(dated.source, {})
