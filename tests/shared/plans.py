"""Skips the tests of plans for which the running torch is too old, with the plan's own reason."""

from __future__ import annotations

import pytest

from glm_core.distributed.plan import lacks, parse


def lack(*plans: str) -> str:
    """Returns what these plans ask for that only a newer torch can do, or ""."""
    return "; ".join(dict.fromkeys(reason for plan in plans for reason in lacks(parse(plan))))


def needs(*plans: str) -> pytest.MarkDecorator:
    """Skips the test where one of the plans asks for a newer torch."""
    return pytest.mark.skipif(bool(lack(*plans)), reason=lack(*plans))
