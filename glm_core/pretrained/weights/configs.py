"""Translates the config.json of a layout to our ModelConfig, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from glm_core.config import ModelConfig, from_dict
from glm_core.errors import CheckpointError, ConfigError
from glm_core.pretrained.weights import keys, scaling
from glm_core.pretrained.weights.layouts import Layout

_ABSENT = object()
CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "mask_token_id",
    "gmask_token_id",
    "tokenizer_type",
)
"""keys about tokens, copied unchanged into a config that is written"""


def read_config(layout: Layout, theirs: dict[str, Any], file: Path) -> ModelConfig:
    """Returns the model that a config.json or model_config.json describes. Raises CheckpointError
    with every key that is missing, of a wrong type, of another architecture, or unknown."""
    values, problems = dict(layout.fixed), _foreign_keys(layout, theirs)
    problems += _unknown_keys(layout, theirs)
    for field in layout.fields:
        candidates = (_get(theirs, path) for path in field.theirs)
        present = (v for v in candidates if v is not _ABSENT and v is not None)
        value = next(present, field.default)
        if value is None:
            problems.append(f"{field.theirs[0]} is missing")
        elif field.unit is not None and isinstance(value, int | float):
            value = value * field.unit
        values[field.ours] = value
    if layout.rope_table:
        rotation, wrong = scaling.read_scaling(theirs, values["max_length"], layout.rope_share)
        if not values.get("kv_latent"):  # only latent attention multiplies its scores
            rotation.pop("rope_score_factor", None)
        values, problems = values | rotation, problems + wrong
        problems += _read_experts(values, theirs)
    if not problems:
        if values["ffn"] == 0 and isinstance(values["hidden"], int):
            values["ffn"] = 4 * values["hidden"]
        try:
            return from_dict(ModelConfig, values)
        except (ConfigError, TypeError) as error:
            problems.append(str(error))
    raise CheckpointError(
        f"{file}: does not describe a model of layout {layout.name}: {'; '.join(problems)}; "
        "check that it belongs to these weights"
    )


def _read_experts(values: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Puts our head_dim and number of dense layers in place of what their keys say. Returns the
    problems."""
    if values.get("kv_latent") and type(values["head_dim"]) is type(values["rope_head_dim"]) is int:
        values["head_dim"] += values["rope_head_dim"]
    kinds = theirs.get("mlp_layer_types")
    if kinds is None or "num_dense_layers" not in values:
        return []
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    known = isinstance(kinds, list) and len(kinds) == values["num_layers"]
    if not known or kinds != _layer_types(dense, len(kinds)):
        return [f"mlp_layer_types is {kinds!r}, only dense layers before sparse ones are known"]
    values["num_dense_layers"] = dense
    return []


def _layer_types(dense: int, layers: int) -> list[str]:
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _foreign_keys(layout: Layout, theirs: dict[str, Any]) -> list[str]:
    """Returns a message for each key whose value belongs to another architecture."""
    expected = {k: v for k, v in layout.header.items() if k != "architectures"}
    expected |= {**keys.DISABLED, **layout.required}
    given = {**layout.left_out, **theirs}
    values = {key: (_get(given, key), _choices(v)) for key, v in expected.items()}
    return [
        f"{key} is {value!r}, only {' or '.join(map(repr, allowed))} is known"
        for key, (value, allowed) in values.items()
        if value is not _ABSENT and value is not None and value not in allowed
    ]


def _choices(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _unknown_keys(layout: Layout, theirs: dict[str, Any]) -> list[str]:
    """Returns a message for the keys that nobody reads and that are not known to be neutral."""
    honoured = {path.partition(".")[0] for field in layout.fields for path in field.theirs}
    honoured |= {*layout.required, *layout.header, *keys.DISABLED, "architectures", "model_type"}
    if layout.rope_table:
        honoured |= scaling.TOP_LEVEL
    if "num_dense_layers" in {f.ours for f in layout.fields}:
        honoured.add("mlp_layer_types")
    strange = [
        key
        for key, value in theirs.items()
        if key not in honoured and value is not None and not keys.neutral(layout.name, key)
    ]
    if not strange:
        return []
    named = ", ".join(f"{key}={theirs[key]!r}"[:60] for key in strange)
    return [f"unknown keys that may change the result: {named} (remove what does not)"]


def write_config(
    layout: Layout, config: ModelConfig, source: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Returns a config.json of this layout, with the token ids of the source's config. Raises
    CheckpointError if the layout cannot express the model."""
    _require_expressible(layout, config)
    result: dict[str, Any] = {**layout.header, "torch_dtype": dtype}
    result |= {key: source[key] for key in CARRIED if key in source}
    for path, value in layout.required.items():
        _put(result, path, _choices(value)[0])
    for field in layout.fields:
        value = getattr(config, field.ours)
        _put(result, field.theirs[0], value / field.unit if field.unit else value)
    if "kv_latent" in {f.ours for f in layout.fields} and config.kv_latent and layout.rope_table:
        result["qk_nope_head_dim"] = config.head_dim - config.rope_head_dim
        result["q_lora_rank"] = config.q_latent or None
        result["mlp_layer_types"] = _layer_types(config.num_dense_layers, config.num_layers)
    return result | (scaling.write_scaling(config) if layout.rope_table else {})


def _require_expressible(layout: Layout, config: ModelConfig) -> None:
    """Raises CheckpointError for fields that the layout's config cannot state."""
    named = {f.ours for f in layout.fields}
    implied = {
        "head_dim": config.hidden // config.num_heads,
        "num_kv_heads": config.num_heads,
        "value_head_dim": config.head_dim if config.kv_latent else 0,
        "max_length": config.max_length,
    }
    if layout.rope_table:
        named |= {f.name for f in dataclasses.fields(config) if f.name.startswith("rope_")}
        named -= {"rope_interleaved", "rope_float16"}
    training_only = {"embedding_gradient_shrink", "init_std", "mtp_weight", "balance_weight"}
    inexpressible = [
        f"{f.name}={getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if f.name not in named | training_only
        and getattr(config, f.name) != layout.fixed.get(f.name, implied.get(f.name, f.default))
    ]
    if inexpressible:
        raise CheckpointError(
            f"layout {layout.name} cannot express {', '.join(inexpressible)}; choose another "
            "layout, or glm-core, which holds every model"
        )


def _get(table: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(table, dict) or part not in table:
            return _ABSENT
        table = table[part]
    return table


def _put(table: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        table = table.setdefault(part, {})
    table[last] = value
