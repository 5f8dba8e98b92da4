"""Says how the discrete result of an op is judged, such as the experts that a router chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """An op's first result is chosen by scores, so its results jump where two scores come close: an
    honest kernel may choose otherwise there, and only there. The functions take the op's own
    arguments by name."""

    scores: Callable[..., Tensor]
    """returns the scores that the op chooses by"""
    shortfall: Callable[..., Tensor]
    """takes the exact `scores`, the error `slack` that each of them may have, what was `chosen`,
    and the op's arguments. Returns for each row how far the choice is from the best one, in units
    of the slack: up to 1 is honest; infinite where an exact tie went to the wrong side"""
    gaps: Callable[..., Tensor]
    """takes the exact `scores` and the op's arguments. Returns for each row the distances between
    neighbours in the order that the choice follows: a row may flip where one is within rounding"""
    others: Callable[..., Iterable[Tensor]]
    """takes the exact `scores` and the op's arguments. Returns the best choice of every row, then
    those that a row may flip to where a few scores come close; `shortfall` judges them"""
    given: Callable[..., Any]
    """the reference, told by `chosen` what it chooses"""
