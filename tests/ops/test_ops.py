"""Every op's declaration is complete, its reference has the right gradients, and every backend's
kernels have the op's parameters."""

from __future__ import annotations

import inspect

import pytest
import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.errors import BackendUnavailableError
from glm_core.spec import Cost, Sample

OPS = ops.all_ops()

SAMPLES = [pytest.param(o, s, id=f"{o.name}-{s.id}") for o in OPS.values() for s in o.samples()]


def _kind_missing(op: Op) -> set[str]:
    """Returns the promised kinds of sample that the op lacks."""
    samples = [s for s in op.samples() if not (s.real or s.large)]
    sizes, spreads, layouts = set[int](), set[float](), set[bool]()
    for sample in samples:
        arguments = sample.make(torch.float32)
        outputs = op.reference(**arguments)
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        for value in (*arguments.values(), *results):
            tensors = value if isinstance(value, list) else [value]
            for t in (t for t in tensors if isinstance(t, torch.Tensor)):
                sizes.add(t.numel())
                layouts.add(t.is_contiguous())
                if t.is_floating_point() and t.numel() > 8:
                    spreads.add(float(t.abs().median()))
    kinds = {
        "empty": 0 in sizes,
        "one element": 1 in sizes,
        "odd size": any(n % 2 and n > 1 for n in sizes),
        "not contiguous": False in layouts,
        "tiny": min(spreads) < 0.02,
        "huge": max(spreads) > 10,
        "a published model's shape": any(s.real for s in op.samples()),
        "large": any(s.large for s in op.samples()),
    }
    return {kind for kind, there in kinds.items() if not there}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_samples_are_of_every_kind(op: Op) -> None:
    ids = [s.id for s in op.samples()]
    assert len(ids) == len(set(ids))
    assert not _kind_missing(op)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_doc_has_formula_shapes_dtype_rule_and_source(op: Op) -> None:
    words = {
        "formula": any(sign in op.doc for sign in ("=", "sqrt", "cos")),
        "shapes": "->" in op.doc or op.mutates,
        "dtype rule": "float32" in op.doc or "every dtype" in op.doc,
        "source": any(f"{year}" in op.doc for year in range(2013, 2027)) or "torch.nn" in op.doc,
    }
    assert not [w for w, there in words.items() if not there]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_schema_is_typed(op: Op) -> None:
    signature = inspect.signature(op.reference)
    assert signature.return_annotation is not inspect.Signature.empty
    untyped = [n for n, p in signature.parameters.items() if p.annotation is p.empty]
    assert not untyped
    assert list(inspect.signature(op.cost).parameters) == list(signature.parameters)
    assert op.differentiable or op.mutates or op.name == "global_norm"


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_cost_is_counted_without_arithmetic(op: Op, sample: Sample) -> None:
    cost = op.cost(**sample.make(torch.bfloat16, "meta"))
    assert isinstance(cost, Cost)
    assert all(isinstance(n, int) and n >= 0 for n in cost)
    if sample.real:
        assert cost.bytes > 0
        assert cost.backward_bytes > 0 or not op.differentiable


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_samples_are_the_same_every_time(op: Op, sample: Sample) -> None:
    if sample.real or sample.large:
        pytest.skip("large; made by the same function")
    first, second = (sample.make(torch.bfloat16) for _ in range(2))
    other = sample.make(torch.bfloat16, seed=1)
    flat = [
        [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]
        for arguments in (first, second, other)
    ]
    tensors = [[t for t in f if isinstance(t, torch.Tensor)] for f in flat]
    assert all(torch.equal(a, b) for a, b in zip(*tensors[:2], strict=True))
    drawn = not sample.id.endswith("-tied")  # of scores that are equal on purpose
    if drawn and sum(t.numel() for t in tensors[0] if t.is_floating_point()) > 8:
        assert not all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[2], strict=True))


def _gradcheck(op: Op, sample: Sample) -> bool:
    """torch.autograd.gradcheck of the reference in float64 with respect to op.differentiable."""
    arguments = sample.make(torch.float64)
    names = [n for n in op.differentiable if isinstance(arguments.get(n), torch.Tensor)]
    leaves = [arguments[n].clone().requires_grad_() for n in names]

    def function(*tensors: torch.Tensor) -> object:
        return op.reference(**{**arguments, **dict(zip(names, tensors, strict=True))})

    return bool(torch.autograd.gradcheck(function, leaves, fast_mode=True))


@pytest.mark.parametrize(
    "op", [pytest.param(o, id=o.name) for o in OPS.values() if o.differentiable]
)
def test_reference_gradients_by_finite_differences(op: Op) -> None:
    checked = 0
    for sample in op.samples():
        ill = any(word in sample.id for word in ("huge", "tiny", "mixed", "offset", "tied"))
        shrunk = float(sample.args.get("shrink", 1.0)) != 1.0  # a gradient other than the value's
        rounded = sample.args.get("activation_bits") == 8  # its gradient passes straight through
        if not (sample.real or sample.large or ill or shrunk or rounded):
            assert _gradcheck(op, sample), sample.id
            checked += 1
    assert checked >= 4


def test_gradient_passes_straight_through_rounded_activations() -> None:
    arguments = next(s for s in ops.quantized_linear.samples() if s.id.endswith("int4-a8")).make(
        torch.float64
    )
    grads = []
    for bits in (8, 16):
        x = arguments["x"].clone().requires_grad_()
        ops.quantized_linear.reference(
            **{**arguments, "x": x, "activation_bits": bits}
        ).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert arguments["x"].abs().max() > 0


def test_shrink_scales_the_gradient_alone() -> None:
    ids, weight = torch.tensor([3, 1, 3]), torch.randn(5, 4, dtype=torch.float64)
    grads = []
    for shrink in (1.0, 0.1):
        leaf = weight.clone().requires_grad_()
        y = ops.embedding.reference(ids, leaf, shrink)
        assert torch.equal(y, weight[ids])
        y.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0] * 0.1)


def _registered() -> list[Backend]:
    backends = []
    for name in registry.names():
        try:
            backends.append(registry.get(name))
        except BackendUnavailableError:
            continue
    return backends


@pytest.mark.parametrize("backend", _registered(), ids=lambda b: b.name)
def test_kernel_signatures_are_the_ops(backend: Backend) -> None:
    """`implements` refuses others; this holds what is in the registry now, however it got there."""
    # onnxrt also takes ops that other tests declare for themselves
    for name, kernel in ((n, k) for n, k in backend.kernels.items() if n in OPS):
        want = inspect.signature(OPS[name].reference).parameters
        for function in filter(None, kernel):
            got = inspect.signature(function).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in got.values()):
                facts = [[(n, p.default) for n, p in ps.items()] for ps in (want, got)]
                assert facts[0] == facts[1], f"{backend.name}: {name}"
