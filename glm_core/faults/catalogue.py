"""Lists the faults and benign changes of all op families. To add one, declare it in the module of
its family: by `fault` or `mutant` if it is wrong, by `benign` if it is honest."""

from __future__ import annotations

from glm_core.faults import (  # noqa: F401  # imported for what they declare
    activation,
    attention,
    embedding,
    experts,
    linear,
    loss,
    norm,
    optim,
    quant,
    rope,
    routing,
    sparse_steps,
    whole_runs,
)
from glm_core.faults.fault import BENIGN, FAULTS, Fault
from glm_core.faults.general import general
from glm_core.ops import all_ops

PLANTED = [f for f in FAULTS if f.planted]
"""faults that the sensitivity campaign plants in training runs"""

__all__ = ["BENIGN", "FAULTS", "PLANTED", "every_mutant"]


def every_mutant() -> list[Fault]:
    """Returns the mutants that conformance's samples must reject: the mistakes of particular ops,
    then for every op those that any kernel can make."""
    return [
        *(f for f in FAULTS if f.mutant),
        *(m for op in all_ops().values() for m in general(op)),
    ]
