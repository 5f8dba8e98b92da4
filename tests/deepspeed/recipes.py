"""The inputs that DeepSpeed and we both get: overflows for the loss scale, layers to cut into
stages, and schedules as (name, params) with all forms of their arguments."""

from __future__ import annotations

import random
from typing import Any

STEPS = 30
PATTERN = [random.Random(0).random() < 0.2 for _ in range(60)]
"""of overflows"""
_DRAW = random.Random(1)
WEIGHTS = [
    ([_DRAW.choice((0, 1, 1, 3, 17, 1000)) for _ in range(_DRAW.randrange(1, 14))], n % 5 + 1)
    for n in range(60)
]
"""of a pipeline's layers, with a number of stages"""
BASE: dict[str, Any] = {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2}
SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("LRRangeTest", {}),
    ("LRRangeTest", {"lr_range_test_step_size": 4, "lr_range_test_step_rate": 0.5}),
    ("LRRangeTest", {"lr_range_test_step_size": 4, "lr_range_test_staircase": True}),
    ("LRRangeTest", {"lr_range_test_min_lr": [1e-4, 3e-4], "lr_range_test_step_size": 7}),
    ("OneCycle", {**BASE, "cycle_first_step_size": 5}),
    ("OneCycle", {**BASE, "cycle_first_step_size": 5, "cycle_second_step_size": 8}),
    ("OneCycle", {**BASE, "cycle_first_step_size": 6, "cycle_second_step_size": 0}),
    ("OneCycle", {**BASE, "cycle_first_step_size": 7, "cycle_first_stair_count": 3}),
    (
        "OneCycle",
        {
            **BASE,
            "cycle_first_step_size": 6,
            "cycle_second_step_size": 9,
            "cycle_first_stair_count": 2,
            "cycle_second_stair_count": 4,
        },
    ),
    (
        "OneCycle",
        {
            **BASE,
            "cycle_first_step_size": 4,
            "decay_step_size": 3,
            "decay_lr_rate": 0.2,
            "decay_mom_rate": 0.1,
            "cycle_min_mom": 0.7,
            "cycle_max_mom": 0.95,
        },
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": [1e-3, 2e-3],
            "cycle_max_lr": [1e-2, 4e-2],
            "cycle_first_step_size": 4,
            "cycle_min_mom": [0.8, 0.7],
            "cycle_max_mom": [0.9, 0.99],
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
        },
    ),
    ("OneCycle", {**BASE, "cycle_first_step_size": 5, "cycle_momentum": False}),
    ("WarmupLR", {"warmup_num_steps": 6, "warmup_max_lr": 1e-2}),
    ("WarmupLR", {"warmup_num_steps": 6, "warmup_type": "linear", "warmup_min_lr": [0.0, 1e-4]}),
    ("WarmupDecayLR", {"total_num_steps": 20, "warmup_num_steps": 5, "warmup_max_lr": 1e-2}),
    ("WarmupCosineLR", {"total_num_steps": 20, "warmup_num_steps": 5, "cos_min_ratio": 0.1}),
]


def follow(make: Any, optimizer: Any, start: int) -> list[Any]:
    """Returns the rates and betas of each group at the start and after each step. With `start`, the
    schedule continues from the state of another that has done so many steps."""
    schedule = make(optimizer)
    for _ in range(start):
        schedule.step()
    if start:
        state = schedule.state_dict()
        schedule = make(optimizer)
        schedule.load_state_dict(state)
    seen = []
    for step in range(STEPS):
        if step or not start:
            groups = optimizer.param_groups
            seen.append([[g["lr"] for g in groups], [list(g["betas"]) for g in groups]])
        schedule.step()
    return seen
