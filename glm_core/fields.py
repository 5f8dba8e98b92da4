"""What every config checks its fields with. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal

from glm_core.errors import ConfigError


def positive(names: str) -> dict[str, Any]:
    """Marks fields for `check`: each must be greater than zero."""
    return dict.fromkeys(names.split())


def divisors(n: int) -> str:
    """'1, 2, 4' for 4; of a large n those up to 4096."""
    return ", ".join(str(d) for d in range(1, min(n, 4096) + 1) if n % d == 0)


def check(config: Any, *rules: dict[str, Any]) -> None:
    """Raises one ConfigError that lists every broken rule (a rule is True, or the text that says
    why not, or None for a positive number); of a field's rules the first that is broken."""
    bad: dict[str, str] = {}
    for key, rule in (item for table in rules for item in table.items()):
        value = getattr(config, key)
        if rule is None:
            finite = " and finite" if isinstance(value, float) else ""
            rule = 0 < value < math.inf or "must be positive" + finite
        if rule is not True:
            told = f".{rule}" if dataclasses.is_dataclass(value) else f"={value} {rule}"
            bad.setdefault(key, key + told)
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if allowed and getattr(config, name) not in allowed:
            known = ", ".join(map(str, allowed))
            bad[name] = f"{name} must be one of {known}; received {getattr(config, name)!r}"
    if bad:
        raise ConfigError(f"{type(config).__name__}: " + "; ".join(bad.values()))
