"""DeepSpeed's longer module paths, and what is said of names that are not here."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from glm_core.errors import ConfigError

PACKAGE = "glm_core.deepspeed"
MODULES = {
    "checkpointing": "runtime.activation_checkpointing.checkpointing",
    "utils": "fragments",
    "utils.logging": "fragments",
    "utils.groups": "groups",
    "utils.zero_to_fp32": "consolidate",
    "accelerator.real_accelerator": "accelerator",
    "runtime.engine": "engine",
    "runtime.lr_schedules": "schedules",
    "runtime.utils": "groups",
    "runtime.zero": "zero",
    "runtime.zero.partition_parameters": "zero",
}
"""path in DeepSpeed: module here"""

_SPARSE = "would attend sparsely by its own GPU kernels; use glm_core.ops.attention"
_SERVE = "would serve with inference kernels; use glm_core.serve, or generate on the module"
_DATA = "would reorder or shorten samples; do so in your data loader"
ABSENT = {
    "init_inference": _SERVE,
    "InferenceEngine": _SERVE,
    "inference": _SERVE,
    "module_inject": _SERVE,
    "replace_transformer_layer": _SERVE,
    "tp_model_init": "would split layers by name; use glm_core.distributed's plan (tp=)",
    "DeepSpeedTransformerLayer": "is a GPU kernel; use the model's own layer",
    "DeepSpeedTransformerConfig": "is a GPU kernel's; use the model's own layer",
    "DeepSpeedConfig": "parses a config; pass the config itself to initialize",
    "OnDevice": "would build on a device; use torch.device(...) as a context, or zero.Init",
    "DeepSpeedHybridEngine": _SERVE,
    "compression": "would prune and quantise; use glm_core.ops.quant",
    "compile": "would compile the step with DeepCompile; call torch.compile(model)",
    "moe": "would place experts on ranks; there is no expert parallelism here",
    "sequence": "would split sequences over ranks (Ulysses); use glm_core.distributed's plan",
    "runtime.sequence_parallel": "would split sequences over ranks; use the plan",
    "runtime.domino": "would split layers over ranks; use glm_core.distributed's plan (tp=)",
    "runtime.data_pipeline": _DATA,
    "runtime.fp16": "are optimizer wrappers of the engine's; the engine has no such objects",
    "runtime.config": "parses configs; pass the config itself to initialize",
    "ops.sparse_attention": _SPARSE,
    "ops.op_builder": "would compile DeepSpeed's extensions; nothing is compiled here",
    "ops.transformer": "are GPU kernels; use the model's own layer",
    "runtime.zero.partition_parameters.zero_wrapper_for_fp_tensor_constructor": (
        "wraps tensor constructors; they are left alone here: remove it"
    ),
    "runtime.utils.PartitionedTensor": "splits activations; they are sent whole here: remove it",
    "runtime.utils.all_gather_dp_groups": (
        "gathers the engine's flat buffers; engine.step publishes weights: remove it"
    ),
    "engine.set_data_post_process_func": _DATA,
    "get_accelerator().get_op_builder": "finds extensions; nothing is compiled here: remove it",
    "env_report": "reports on DeepSpeed's extensions; run glm-core doctor",
    "nvme": "would swap to NVMe; use ZeRO 3 on more devices",
    "io": "would write through DeepNVMe; torch.save writes here",
    "launcher": "launches jobs; use glm-core launch or torchrun",
    "autotuning": "would search for batch sizes; set them",
}
"""name or module, with all below it: what it would do, and the way out"""


class MissingName(ConfigError, AttributeError):
    """A name of DeepSpeed's that is not here; `hasattr` says False."""


def way_out(name: str) -> str | None:
    """What is said of an absent name (without the package's)."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        if (says := ABSENT.get(".".join(words[:length]))) is not None:
            return f"deepspeed.{name}: is not here: it {says}"
    return None


def absent(name: str) -> MissingName:
    """The error for an attribute of the package."""
    return MissingName(way_out(name) or f"deepspeed.{name}: is not here; see docs/deepspeed.md")


class _Ours(Loader):
    """Gives the module that is imported already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class Finder(MetaPathFinder):
    """Says the way out where a module is absent; `in_place`: finds `deepspeed` here."""

    in_place = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See MetaPathFinder. Raises ModuleNotFoundError with the way out."""
        top, _, rest = name.removeprefix("glm_core.").partition(".")
        ours = name.startswith(f"{PACKAGE}.")
        if top != "deepspeed" or not (ours or self.in_place):
            return None
        if rest and (says := way_out(rest)) is not None:
            raise ModuleNotFoundError(says, name=name)
        if ours:
            return None
        return ModuleSpec(name, _Ours(importlib.import_module(f"glm_core.{name}")))


FINDER = Finder()


def install() -> None:
    """Makes the longer paths importable."""
    for path, ours in MODULES.items():
        module = importlib.import_module(f"{PACKAGE}.{ours}")
        sys.modules[f"{PACKAGE}.{path}"] = module
        parent, _, leaf = f"{PACKAGE}.{path}".rpartition(".")
        setattr(importlib.import_module(parent), leaf, module)
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
