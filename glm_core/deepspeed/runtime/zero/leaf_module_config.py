"""Holds the config's section `zero_optimization.leaf_module`
(`deepspeed.runtime.zero.leaf_module_config`)."""

from __future__ import annotations

from glm_core.errors import ConfigError, unknown

DEFAULT_LEAF_MODULE_CLASSES = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]
DEFAULT_LEAF_MODULE_NAMES: list[str] = []
DEFAULT_LEAF_MODULE_NAME_SUFFIXES: list[str] = []


class DeepSpeedZeroLeafModuleConfig:
    """The section's values, each a list without repetitions; one string is a list of one."""

    classes: list[str]
    names: list[str]
    name_suffixes: list[str]

    def __init__(self, **given: str | list[str]) -> None:
        """Raises ConfigError for an unknown key."""
        defaults = {
            "classes": DEFAULT_LEAF_MODULE_CLASSES,
            "names": DEFAULT_LEAF_MODULE_NAMES,
            "name_suffixes": DEFAULT_LEAF_MODULE_NAME_SUFFIXES,
        }
        for key in given:
            if key not in defaults:
                raise ConfigError(unknown("leaf_module key", key, defaults))
        for key, default in defaults.items():
            value = given.get(key, default)
            names = [value] if isinstance(value, str) else value
            setattr(self, key, list(dict.fromkeys(map(str, names))))
