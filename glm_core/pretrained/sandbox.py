"""The environment that chat templates run in: names, filters and tags as in transformers'
`apply_chat_template`, so that a template renders here as it does there.

A template is foreign code. It runs in jinja2's sandbox, and sees strings, lists and dicts only."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from glm_core import environment
from glm_core.errors import ConfigError, PromptError


class GenerationTag(jinja2.ext.Extension):
    """The tag `generation`, which marks what the model generates. Its body renders as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Returns the tag's body as a call block, whose variables are its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """The name `dict` of a template: makes dicts, and has no attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Returns dict.fromkeys of the arguments."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without private names, which lead out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the values
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _require_public(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no private name ({name!r})")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    day = environment.date()
    midnight = datetime.time()
    now = datetime.datetime.combine(day, midnight) if day else datetime.datetime.now()
    return now.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON without jinja2's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    del environment.filters["attr"]  # leads out of the sandbox before 3.1.6 (CVE-2025-27516)
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def render(source: str, values: Mapping[str, Any]) -> str:
    """Returns a template rendered with `values`. Raises PromptError where it is broken, reaches out
    of the sandbox, or refuses the values."""
    try:
        return _compile(source).render(values)
    except jinja2.TemplateError as error:
        raise PromptError(f"chat template: {error}; give other roles or order") from None
    except ConfigError:  # of GLM_CORE_DATE
        raise
    except Exception as error:  # whatever Python's operators raise
        raise PromptError(
            f"chat template: {type(error).__name__}: {error}; use the checkpoint's own template"
        ) from None
