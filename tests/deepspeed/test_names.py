"""docs/deepspeed.md tells the truth of every name that public scripts use (names.json, made by
count_names.py)."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed.names import absence_message

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
USED = {name: sum(u.values()) for name, u in json.loads((HERE / "names.json").read_text()).items()}
STATES = ("Works", "Accepted without effect", "Error that says what to do instead")


def listed() -> dict[str, dict[str, int]]:
    """Returns by state the names in the document and their uses."""
    text = (ROOT / "docs/deepspeed.md").read_text()
    found = {}
    for state in STATES:
        paragraph = text.partition(f"**{state}**")[2].partition("\n\n")[0]
        pairs = re.findall(r"`([\w.()]+)` (\d+)", paragraph)
        found[state] = {name: int(uses) for name, uses in pairs}
    return found


def resolves(name: str) -> bool:
    """Can a script use this name?"""
    first, _, rest = name.partition(".")
    if first == "engine":
        kinds = [getattr(deepspeed, k, None) for k in ("DeepSpeedEngine", "PipelineEngine")]
        return any(hasattr(k, rest) for k in kinds)
    if first == "get_accelerator()":
        return hasattr(deepspeed.get_accelerator(), rest)
    words = name.split(".")
    for length in range(len(words), -1, -1):
        try:
            found = importlib.import_module(".".join(["glm_core.deepspeed", *words[:length]]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


def test_every_name_that_scripts_use_twice_is_listed_once() -> None:
    every = [n for names in listed().values() for n in names]
    assert len(every) == len(set(every))
    assert set(every) == {n for n, uses in USED.items() if uses > 1}
    assert all(USED[n] == uses for names in listed().values() for n, uses in names.items())


@pytest.mark.parametrize("state", STATES[:2])
def test_what_is_listed_as_there_is_there(state: str) -> None:
    assert [n for n in listed()[state] if not resolves(n)] == []
    assert listed()[state]


def test_what_is_not_there_says_the_way_out() -> None:
    for name in listed()[STATES[2]]:
        assert not resolves(name), name
        assert re.search(
            r"; (use|do|call|pass|set|run|there|torch|nothing|they|engine)",
            absence_message(name) or "",
        ), name
    assert not hasattr(deepspeed, "init_inference")
    with pytest.raises(AttributeError, match=r"glm_core\.serve"):
        deepspeed.init_inference()
    with pytest.raises(ModuleNotFoundError, match=r"plan \(ep=\)"):
        importlib.import_module("glm_core.deepspeed.moe.layer")


SCRIPT = """
import glm_core.deepspeed.in_place
import deepspeed
import deepspeed.comm as dist
import deepspeed.runtime.lr_schedules
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.real_accelerator import get_accelerator as longer
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.utils import see_memory_usage
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
import glm_core.deepspeed as ours
assert deepspeed is ours and get_accelerator is longer
assert deepspeed.__spec__.name == "glm_core.deepspeed"
assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
try:
    import deepspeed.moe.layer
except ModuleNotFoundError as error:
    print(error)
"""


def test_in_place_of_deepspeed_for_a_whole_process() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert "plan (ep=)" in run.stdout
