"""Torch's private names that we use: the table below knows each of them and how it is called in
torch 2.7 to 2.15, so that the torch that changes one is found here and not by a user."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import private_names
import pytest
import torch

from glm_core import session
from glm_core.versions import torch_version

_PREPARE = "torch.distributed.pipelining.PipelineStage"
_FAKE = "torch._subclasses.fake_tensor"
_REDUCE = "torch.distributed._functional_collectives"
_ATEN = (
    "_log_softmax _log_softmax.default _log_softmax_backward_data _softmax _softmax_backward_data "
    "_to_copy.default"
)
_FOREACH = "add_ addcdiv_ addcmul_ copy_ div div_ lerp_ mul_ sqrt sqrt_ zero_"
SIGNATURES: dict[str, tuple[str, ...]] = {
    **{f"torch._foreach_{name}": () for name in _FOREACH.split()},
    "torch.Tensor._make_wrapper_subclass": (),
    "torch._C._distributed_c10d._resolve_process_group": (),
    "torch._C._AutoDispatchBelowAutograd": (),
    "torch._C.DisableTorchFunction": (),
    "torch._C._autograd._get_sequence_nr": (),
    "torch._C._current_autograd_node": (),
    "torch._C._are_functorch_transforms_active": (),
    "torch._assert_async": (),
    "torch.autograd.Variable._execution_engine.queue_callback": (),
    "torch._decomp.core_aten_decompositions": ("",),
    "torch._decomp.get_decompositions": ("aten_ops type",),
    "torch._ops.OpOverload": ("overloadpacket op op_dk schema tags",),
    f"{_FAKE}.FakeTensor": (),  # only for isinstance
    f"{_FAKE}.FakeTensorMode": (
        "allow_fallback_kernels allow_non_fake_inputs shape_env static_shapes export",
    ),
    f"{_FAKE}.is_fake": ("x",),
    f"{_REDUCE}.all_reduce": ("self reduceOp group tag",),
    f"{_REDUCE}.all_to_all_single": ("self output_split_sizes input_split_sizes group tag",),
    f"{_REDUCE}.wait_tensor": ("tensor",),
    "torch.distributed.distributed_c10d._get_default_store": ("",),
    "torch.distributed.distributed_c10d._world.pg_map": (),
    "torch.distributed.pipelining.schedules._batch_p2p": ("p2p_ops desc",),
    f"{_PREPARE}._get_init_p2p_neighbors_ops": ("self",),
    f"{_PREPARE}._prepare_backward_infra": (
        "self num_microbatches",
        "self num_microbatches loss_fn target received_grad_meta loss_kwargs",
    ),
    f"{_PREPARE}._prepare_forward_infra": (
        "self num_microbatches args kwargs",
        "self num_microbatches args kwargs has_backward",
    ),
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "global_shape mesh placements",
        "global_shape mesh placements skip_offset",
    ),
    "torch.nn.Module._apply": ("self fn recurse",),
    "torch.ops._c10d_functional.wait_tensor.default": (),
    "torch.ops.aten._local_scalar_dense.default": (),
    **{f"torch.ops.aten.{name}": () for name in _ATEN.split()},
    "torch.ops.mkldnn._linear_pointwise": (),
    "torch.testing._internal.distributed.fake_pg.FakeStore": (),
    "torch.utils._python_dispatch.TorchDispatchMode": ("_dispatch_key",),
    "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo": ("",),
    "torch.utils._python_dispatch._disable_current_modes": ("",),
    "torch.utils._pytree.tree_leaves": ("tree is_leaf",),
    "torch.utils._pytree.tree_map": ("func tree rests is_leaf",),
}
"""by name: the parameters that torch 2.7 to 2.15 have shown; () where Python sees none"""
OWNERS: dict[str, Any] = {
    "._buffers": torch.nn.Module(),
    "._cdata": torch.zeros(1).untyped_storage(),
    "._forward_hooks": torch.nn.Module(),
    "._forward_pre_hooks": torch.nn.Module(),
    "._get_sequence_number_for_group": private_names.resolved("torch.distributed.ProcessGroup"),
    "._is_view": torch.zeros(1),
    "._sequence_nr": torch.ones(1, requires_grad=True).exp().grad_fn,
    "._schema": torch.ops.aten.add.Tensor,
    "._version": torch.zeros(1),
}
"""by the name of an attribute: something that has it"""
FIRST = {
    f"{_PREPARE}._get_init_p2p_neighbors_ops": (2, 9),
    "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo": (2, 11),
}
"""by name: the first torch of those tried that has it"""
UNTIL = {name: (2, 15) for name in SIGNATURES if name.startswith(_PREPARE)}
"""by name: the first torch for which we do without it"""
RUNNING = tuple(map(int, torch_version().split(".")[:2]))


@functools.cache
def used() -> dict[str, set[str]]:
    """Returns the files that use each private name; read once, not at collection."""
    return private_names.used()


def test_the_table_holds_every_private_name_in_use() -> None:
    known = {*SIGNATURES, *OWNERS}
    new = {name: sorted(used()[name]) for name in used().keys() - known}
    assert not new, f"private names of torch's: {new}; use a public one, or add it to the table"
    gone = {name for name in known - used().keys() if in_use(name)}
    assert not gone, f"private names of torch's that nothing uses: {gone}; delete their lines"


def in_use(name: str) -> bool:
    """Says whether the name is used on this torch."""
    return FIRST.get(name, RUNNING) <= RUNNING < UNTIL.get(name, (99,))


@pytest.mark.parametrize("name", [*SIGNATURES, *OWNERS])
def test_torch_still_has_the_name_as_it_was(name: str) -> None:
    if not in_use(name):
        pytest.skip(f"not used on torch {torch_version()}")
    if fault := changed(name):
        users = sorted(used().get(name, ()))
        pytest.fail(f"torch {torch_version()}: {fault}; used by {users}")


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    """session.py does what this function of torch's does, without importing the compiler."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(session._fell_back_while_compiling)


def changed(name: str) -> str:
    """Returns what is not as the table says; "" where nothing is."""
    if name in OWNERS:
        return "" if hasattr(OWNERS[name], name[1:]) else f"{OWNERS[name]!r} has no {name[1:]}"
    try:
        thing = private_names.resolved(name)
    except AttributeError as error:
        return str(error)
    if not SIGNATURES[name]:
        return ""
    parameters = " ".join(inspect.signature(thing).parameters)
    known = " | ".join(f"({p})" for p in SIGNATURES[name])
    return "" if parameters in SIGNATURES[name] else f"{name} takes ({parameters}), known: {known}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch._a import b", "torch._a.b"),
        ("import torch\nx = torch.nn._functions.b(1)", "torch.nn._functions.b"),
        ("from torch import distributed as d\nd.c10d._world", "torch.distributed.c10d._world"),
        ("def f(x):\n    return x._private", "._private"),
        (
            "from torch import nn\nclass A(nn.Module):\n    def _apply(self): ...",
            "torch.nn.Module._apply",
        ),
    ],
)
def test_the_scan_finds_each_kind_of_use(source: str, name: str) -> None:
    assert private_names.names_in(source) == {name}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("torch._gone", "does not exist"),
        ("torch.utils._pytree.tree_map", "takes (func tree rests is_leaf), known: (tree)"),
    ],
)
def test_a_name_that_is_gone_or_has_changed_is_told(
    name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIGNATURES, name, ("tree",))
    assert fault in changed(name)
