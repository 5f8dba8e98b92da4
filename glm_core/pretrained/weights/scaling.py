"""Translates transformers' rope_parameters (or rope_scaling, its older name) to our fields, and
back."""

from __future__ import annotations

import math
from typing import Any

from glm_core.config import ModelConfig

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
TOP_LEVEL = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL}
"""keys of the config itself that describe the rotation"""
KEYS = {
    "default": _COMMON,
    "linear": {*_COMMON, "factor", _ORIGINAL},
    "dynamic": {*_COMMON, "factor", _ORIGINAL},
    "yarn": {
        *_COMMON,
        *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "llama3": {*_COMMON, "factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
}
"""the keys of each rope_type; linear and dynamic scaling take no notice of the original length"""


def read_scaling(
    theirs: dict[str, Any], max_length: Any, share: float
) -> tuple[dict[str, Any], list[str]]:
    """Returns our fields of rotation, and a message for each key that is unknown or of a wrong
    type. share: of a head that is rotated where the config does not say it. Names, precedence and
    other defaults are transformers' (modeling_rope_utils)."""
    where = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    table = theirs.get(where) or {}
    if not isinstance(table, dict):
        return {}, [f"{where} is {table!r}, expected a table"]
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in KEYS:
        return {}, [f"{where}.rope_type is {kind!r}; known: {', '.join(KEYS)}"]
    given = {k: v for k, v in table.items() if v is not None}
    problems = [
        f"{where}.{k} is not known for rope_type {kind!r}" for k in given if k not in KEYS[kind]
    ]
    given = {**given, **_outside(theirs, given, kind, share)}
    problems += [
        f"{where}.{k}: expected a number, received {v!r}"
        for k, v in given.items()
        if k in KEYS[kind] - {"rope_type", "type", "truncate"}
        and (isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < math.inf)
    ]
    if problems:
        return {}, problems
    fields = {"rope_base": given["rope_theta"], "rope_fraction": given["partial_rotary_factor"]}
    if kind == "default":
        return fields, []
    if type(max_length) is not int:
        return {}, []  # reported with its own key
    try:
        return fields | _scaled(kind, given, max_length), []
    except KeyError as missing:
        return {}, [f"{where}.{missing.args[0]} is missing"]


def _outside(
    theirs: dict[str, Any], given: dict[str, Any], kind: str, share: float
) -> dict[str, Any]:
    """Returns what stands beside the table. There, an original length wins; base and share are
    used where the table has none."""
    outside = {
        key: theirs[key] if theirs.get(key) is not None else default
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", share))
        if key not in given
    }
    if theirs.get(_ORIGINAL) is not None and kind in ("yarn", "llama3"):
        outside[_ORIGINAL] = theirs[_ORIGINAL]
    return outside


def _scaled(kind: str, given: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Returns our fields of a scaled rotation. Dynamic and YaRN scaling are written beside the
    length before scaling, so the model reads `factor` times as many tokens. Raises KeyError."""
    original = max_length if kind in ("linear", "dynamic") else given.get(_ORIGINAL, max_length)
    factor = given["factor"] if kind != "yarn" or "factor" in given else max_length / original
    fields = {"rope_scaling": kind, "rope_factor": factor, "rope_original_length": original}
    if kind in ("dynamic", "yarn"):
        fields["max_length"] = max(max_length, int(original * factor))
    if kind == "yarn":
        fields |= {
            "rope_low_rotations": given.get("beta_slow", 1.0),
            "rope_high_rotations": given.get("beta_fast", 32.0),
            "rope_truncate": given.get("truncate", True),
            "rope_attention_factor": _attention_factor(given, factor),
            "rope_score_factor": _ramp(given.get("mscale_all_dim", 0.0), factor) ** 2,
        }
    elif kind == "llama3":
        fields["rope_low_rotations"] = given["low_freq_factor"]
        fields["rope_high_rotations"] = given["high_freq_factor"]
    return fields


def _attention_factor(given: dict[str, Any], factor: float) -> float:
    """Returns YaRN's factor on cos and sin: 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 25), with
    DeepSeek's `mscale` in numerator and denominator where both are given."""
    if "attention_factor" in given:
        return float(given["attention_factor"])

    if "mscale" in given and "mscale_all_dim" in given:
        return _ramp(given["mscale"], factor) / _ramp(given["mscale_all_dim"], factor)
    return _ramp(1.0, factor)


def _ramp(scale: float, factor: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_scaling(config: ModelConfig) -> dict[str, Any]:
    """Returns rope_parameters, and max_position_embeddings where it is not `max_length`."""
    kind = config.rope_scaling
    table = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": config.rope_base,
        "partial_rotary_factor": config.rope_fraction,
    }
    if kind != "none":
        table["factor"] = config.rope_factor
    if kind in ("yarn", "llama3"):
        table[_ORIGINAL] = config.rope_original_length
    if kind == "llama3":
        table["low_freq_factor"] = config.rope_low_rotations
        table["high_freq_factor"] = config.rope_high_rotations
    if kind == "yarn":
        table |= {
            "beta_slow": config.rope_low_rotations,
            "beta_fast": config.rope_high_rotations,
            "truncate": config.rope_truncate,
            "attention_factor": config.rope_attention_factor,
        }
    if config.rope_score_factor != 1:
        table["mscale_all_dim"] = _mscale(config)
    length = {"max_position_embeddings": config.rope_original_length} if kind == "dynamic" else {}
    return {"rope_parameters": table, **length}


def _mscale(config: ModelConfig) -> float:
    """Returns the `mscale_all_dim` that `_ramp` makes the root of the factor on scores from."""
    return (config.rope_score_factor**0.5 - 1) / (0.1 * math.log(config.rope_factor))
