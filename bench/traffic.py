"""Counts what a training step moves through memory and how many operators it calls, without running
it: `python -m glm_core.bench.traffic --preset glm4-34m`.

The step is that of `bench.step`, on fake tensors. An operator's bytes are those of the tensors that
it takes and returns, once each, twice where they change in place: what it must move if nothing
stays in a cache. The sum leaves out products of matrices, which are bound by arithmetic."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm_core.bench import step
from glm_core.config import ModelConfig
from glm_core.model.glm import GLM
from glm_core.model.presets import preset

PRODUCTS = ("linear_forward", "mm", "addmm", "linear_cross_entropy_forward")


class Traffic(TorchDispatchMode):
    """Counts operators and their bytes. A value that is read from the device is 1."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls, self.num_bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket).rpartition(".")[2]
        if name == "_local_scalar_dense":
            return 1.0
        result = func(*args, **(kwargs or {}))
        free = func.is_view or "empty" in name or name == "_unsafe_view"
        if func.namespace != "prim" and not free:
            changed = [
                value
                for value, parameter in zip(args, func._schema.arguments, strict=False)
                if parameter.alias_info is not None and parameter.alias_info.is_write
            ]
            self.calls[name] += 1
            self.num_bytes[name] += _num_bytes((args, kwargs, result)) + _num_bytes(changed)
        return result


def _num_bytes(values: Any) -> int:
    found = {id(t): t.nbytes for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(found.values())


def counted(config: ModelConfig, sizes: tuple[int, int]) -> Traffic:
    """Returns what the second of two steps in bfloat16 calls and moves."""

    def to(model: GLM, *_: Any) -> GLM:
        torch.set_default_dtype(torch.float32)
        return model  # is bfloat16 already: fake parameters cannot be converted in place

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.multiple(GLM, init_weights=lambda model, seed: model, to=to),
    ):
        torch.set_default_dtype(torch.bfloat16)
        try:
            run = step.ours(config, "bfloat16", sizes=sizes)
        finally:
            torch.set_default_dtype(torch.float32)
        for _ in range(2):
            with Traffic() as found:
                run()
    return found


def main() -> int:
    """Prints a line for each operator, the one that moves most first."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.traffic", description=__doc__)
    parser.add_argument("--preset", default="glm-4-9b")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--vocab", type=int, default=65024, metavar="N", help="default %(default)s")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="default %(default)s")
    args = parser.parse_args()
    sizes = {"num_layers": args.layers, "vocab": args.vocab, "max_length": args.length}
    found = counted(preset(args.preset, **sizes), (args.batch, args.length))
    others = sum(n for name, n in found.num_bytes.items() if name not in PRODUCTS)
    for name, moved in found.num_bytes.most_common():
        print(f"{name:32} {found.calls[name]:5}  {moved / 1e9:9.3f} GB")
    print(f"{found.calls.total()} calls; outside of products {others / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
