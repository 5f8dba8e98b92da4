"""Decides how scripts find DeepSpeed's modules here, and what they read where a name is absent."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from glm_core.errors import ConfigError

PACKAGE = "glm_core.deepspeed"
ALIASES = {
    "checkpointing": "runtime.activation_checkpointing.checkpointing",
    "zero": "runtime.zero",
}
"""names that DeepSpeed gives to modules whose files lie elsewhere; all other modules have
DeepSpeed's own paths"""

_SPARSE = "would run sparse attention by its own GPU kernels; use glm_core.ops.attention"
_SERVE = "would serve with inference kernels; use glm_core.serve, or generate on the module"
_SEQUENCE = "would split sequences over ranks (Ulysses); use glm_core.distributed's plan"
_DATA = "would reorder or shorten samples; do so in your data loader"
ABSENT = {
    "init_inference": _SERVE,
    "InferenceEngine": _SERVE,
    "inference": _SERVE,
    "module_inject": _SERVE,
    "replace_transformer_layer": _SERVE,
    "tp_model_init": "would split layers by name; use glm_core.distributed's plan (tp=)",
    "DeepSpeedTransformerLayer": "is a GPU kernel; use the model's own layer",
    "DeepSpeedTransformerConfig": "configures a GPU kernel; use the model's own layer",
    "OnDevice": "would build on a device; use torch.device(...) as a context, or zero.Init",
    "DeepSpeedHybridEngine": _SERVE,
    "compression": "would prune and quantise; use glm_core.ops.quant",
    "compile": "would compile the step with DeepCompile; call torch.compile(model)",
    **dict.fromkeys(
        ("moe.layer", "moe.experts", "moe.sharded_moe", "moe.mappings"),
        "would place a script's own experts on ranks; use glm_core.distributed's plan (ep=)",
    ),
    "sequence": _SEQUENCE,
    "runtime.sequence_parallel": _SEQUENCE,
    "runtime.domino": "would split layers over ranks; use glm_core.distributed's plan (tp=)",
    "runtime.data_pipeline": _DATA,
    "runtime.fp16": "wraps optimizers inside the engine; there are no such wrappers here",
    "ops.sparse_attention": _SPARSE,
    "ops.op_builder": "would compile DeepSpeed's extensions; nothing is compiled here",
    "ops.transformer": "holds GPU kernels; use the model's own layer",
    "runtime.utils.all_gather_dp_groups": (
        "gathers the engine's flat buffers; engine.step publishes weights: remove it"
    ),
    "engine.set_data_post_process_func": _DATA,
    "get_accelerator().get_op_builder": "finds extensions; nothing is compiled here: remove it",
    "env_report": "reports on DeepSpeed's extensions; run glm-core doctor",
    "nvme": "would swap to NVMe; use ZeRO 3 on more devices",
    "io": "would write through DeepNVMe; torch.save writes here",
    "launcher": "launches jobs; use glm-core launch, or torchrun",
    "autotuning": "would search for batch sizes; set them",
}
"""an absent name or module (with all below it): what it would do, and what to do instead"""


class MissingName(ConfigError, AttributeError):
    """A name of DeepSpeed's that is absent here; `hasattr` is False for it."""


def absence_message(name: str) -> str | None:
    """Returns the error message for a name (without the package's), None where nothing special is
    known of it."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        if (reason := ABSENT.get(".".join(words[:length]))) is not None:
            return f"deepspeed.{name}: is not available here: it {reason}"
    return None


def absent(name: str) -> MissingName:
    """Returns the error for an absent attribute of the package."""
    return MissingName(
        absence_message(name) or f"deepspeed.{name}: is not available here; see docs/deepspeed.md"
    )


class _Imported(Loader):
    """Loads a module that is imported already under its own name."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Installed(Distribution):
    """Says that DeepSpeed is installed, for packages that look before they import it."""

    def read_text(self, filename: str) -> str | None:
        version = sys.modules[PACKAGE].version
        text = f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class Finder(DistributionFinder):
    """Tells what to do instead where a module of DeepSpeed's is absent."""

    in_place = False
    """find `deepspeed` itself here, not only `glm_core.deepspeed`"""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See MetaPathFinder. Raises ModuleNotFoundError for absent modules."""
        top, _, rest = name.removeprefix("glm_core.").partition(".")
        under_own_name = name.startswith(f"{PACKAGE}.")
        if top != "deepspeed" or not (under_own_name or self.in_place):
            return None
        if rest and (message := absence_message(rest)) is not None:
            raise ModuleNotFoundError(message, name=name)
        if under_own_name:
            return None
        return ModuleSpec(name, _Imported(importlib.import_module(f"glm_core.{name}")))

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """See DistributionFinder."""
        if self.in_place and (context is None or context.name in (None, "deepspeed")):
            yield _Installed()


FINDER = Finder()


def install() -> None:
    """Makes the aliases importable, and absent modules tell what to do instead."""
    for alias, path in ALIASES.items():
        module = importlib.import_module(f"{PACKAGE}.{path}")
        sys.modules[f"{PACKAGE}.{alias}"] = module
        setattr(sys.modules[PACKAGE], alias, module)
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
