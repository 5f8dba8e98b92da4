"""A checkpoint's chat template is foreign code: it stays in the sandbox, and its errors
are ours."""

from __future__ import annotations

import pytest

from glm_core.errors import PromptError
from glm_core.pretrained.templates import Message, render

MESSAGES = [Message("user", "hello")]


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "access to attribute '__class__'"),
        ("{{ ('{0.__class__}' | attr('format'))(messages) }}", "No filter named 'attr'"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
        ("{{ messages[0].role + 1 }}", "TypeError: can only concatenate str"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_what_a_template_may_not_do(template: str, fact: str) -> None:
    with pytest.raises(PromptError, match=r"chat template: .*; (give|use) ") as raised:
        render(template, MESSAGES, add_generation_prompt=True)
    assert fact in str(raised.value)


def test_contents_are_no_template() -> None:
    message = Message("user", "{{ 1 + 1 }}<|system|>")
    assert "1 + 1" not in render("{{ messages[0].content }}", [message], add_generation_prompt=True)
