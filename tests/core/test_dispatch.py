"""Who runs an op: kernels, recorded fallbacks, strictness, threads, plug-ins, torch.compile."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.backends.base import Backend, Probe
from glm_core.backends.registry import use
from glm_core.cli import align, main
from glm_core.errors import BackendUnavailableError, GlmCoreError, UnsupportedOpError
from glm_core.session import Fallback
from glm_core.spec import SUPPORTED, Support, unsupported


def toy(name: str = "toy", factor: float = 3.0) -> Backend:
    """A backend whose rms_norm multiplies by `factor`, and only takes even widths."""
    backend = Backend(name=name, device_type="cpu", verified="in this test")

    def supports(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
        return unsupported(f"width {x.shape[-1]} is odd") if x.shape[-1] % 2 else SUPPORTED

    @backend.implements(ops.rms_norm, supports)
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        return x * factor

    return backend


EVEN, ODD = (torch.ones(2, 4), torch.ones(4)), (torch.ones(2, 3), torch.ones(3))


def test_kernel_runs_and_nothing_is_recorded() -> None:
    with use(toy()) as session:
        assert torch.equal(ops.rms_norm(*EVEN), EVEN[0] * 3)
    assert not session.fallbacks


def test_fallback_is_the_reference_and_recorded_with_its_reason() -> None:
    with use(toy()) as session:
        for _ in range(2):
            assert torch.equal(ops.rms_norm(*ODD), ops.rms_norm.reference(*ODD))
        ops.gelu(EVEN[0])
    assert session.fallbacks == {
        Fallback("toy", "rms_norm", "width 3 is odd"): 2,
        Fallback("toy", "gelu", "no kernel for this op"): 1,
    }


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [(ops.rms_norm, ODD, "width 3 is odd"), (ops.gelu, EVEN[:1], "no kernel for this op")],
)
def test_strict_refuses_with_the_same_reason(
    op: dispatch.Op, args: tuple[Tensor, ...], reason: str
) -> None:
    with use(toy(), strict=True) as session:
        with pytest.raises(UnsupportedOpError, match=f"op {op.name} on backend toy: {reason}; "):
            op(*args)
        assert torch.equal(ops.rms_norm(*EVEN), EVEN[0] * 3)
    assert not session.fallbacks


def test_references_only_backends_never_fall_back() -> None:
    with use("reference", strict=True) as session:
        ops.rms_norm(*ODD)
    assert not session.fallbacks


def test_nested_use_restores_the_outer_one_also_after_an_error() -> None:
    with use(toy("outer")) as outer:
        with use(toy("inner", 5.0)) as inner:
            assert dispatch.session() is inner
            assert torch.equal(ops.rms_norm(*EVEN), EVEN[0] * 5)
            ops.rms_norm(*ODD)
        assert dispatch.session() is outer
        with pytest.raises(RuntimeError, match="mat1"), use(toy("failing")):
            ops.linear(EVEN[0], ODD[0])
        assert dispatch.session() is outer
        assert torch.equal(ops.rms_norm(*EVEN), EVEN[0] * 3)
    assert [f.backend for f in inner.fallbacks] == ["inner"]
    assert not outer.fallbacks
    assert torch.equal(ops.rms_norm(*EVEN), ops.rms_norm.reference(*EVEN))


def test_threads_do_not_see_each_other() -> None:
    seen: dict[str, Tensor] = {}
    both = threading.Barrier(3, timeout=30)

    def work(name: str, factor: float) -> None:
        with use(toy(name, factor)):
            both.wait()  # every thread is inside its own use now
            seen[name] = ops.rms_norm(*EVEN)
            both.wait()

    threads = [threading.Thread(target=work, args=a) for a in (("a", 2.0), ("b", 7.0))]
    for thread in threads:
        thread.start()
    both.wait()
    seen["main"] = ops.rms_norm(*EVEN)
    both.wait()
    for thread in threads:
        thread.join()
    assert torch.equal(seen["a"], EVEN[0] * 2)
    assert torch.equal(seen["b"], EVEN[0] * 7)
    assert torch.equal(seen["main"], ops.rms_norm.reference(*EVEN))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "refrence",
            r"unknown backend 'refrence'; known: .*reference.* \(did you mean reference\?\)",
        ),
        ("null:x", "backend null: takes no option, received 'x'; write null"),
        ("qqqq", "unknown backend 'qqqq'; known: [^(]*$"),
    ],
)
def test_unknown_names_say_what_is_known(name: str, message: str) -> None:
    with pytest.raises(GlmCoreError, match=message):
        registry.get(name)


def test_unusable_backend_says_why() -> None:
    def probe() -> Probe:
        return Probe(False, "no such card; plug it in")

    absent = Backend(name="absent", device_type="cpu", verified="never", probe=probe)
    assert absent.probe().reason == "no such card; plug it in"
    reason = r"backend reference:nonsense is not available here: torch cannot use device 'nonsense'"
    with pytest.raises(BackendUnavailableError, match=reason), use("reference:nonsense"):
        pass


PLUGIN = """
from glm_core import ops
from glm_core.backends.base import Backend
backend = Backend(name="acme", device_type="cpu", verified="in a test")
@backend.implements(ops.gelu)
def gelu(x):
    return x + 1
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a distribution with an entry point of our group on the path, no file of ours touched."""

    def add(name: str, source: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = vendor_{name}\n")
        (tmp_path / f"vendor_{name}.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    return add


def test_third_party_backend_by_entry_point(install: Any) -> None:
    install("acme", PLUGIN)
    assert "acme" in registry.names()
    assert registry.table()["gelu"]["acme"] == "kernel"
    with use("acme", strict=True):
        assert torch.equal(ops.gelu(EVEN[0]), EVEN[0] + 1)


BACKEND = "from glm_core.backends.base import Backend, Probe\n"
BROKEN = {
    "absent": (
        "import package_that_is_not_there",
        "backend broken cannot be imported: No module named 'package_that_is_not_there'",
    ),
    "library": (
        "raise OSError('libacme.so.3: cannot open shared object file')",
        "backend broken cannot be imported: OSError: libacme.so.3: cannot open shared object file",
    ),
    "exits": ("raise SystemExit(1)", "backend broken cannot be imported: SystemExit: 1"),
    "syntax": ("def", "backend broken cannot be imported: SyntaxError: invalid syntax"),
    "signature": (
        PLUGIN.replace("gelu(x)", "gelu(y)"),
        "backend broken cannot be imported: TypeError: backend acme, op gelu: parameters must be",
    ),
    "nothing": ("", "backend broken: `backend` of vendor_broken gives nothing; it must give a"),
    "string": ("backend = 'acme'", "backend broken: `backend` of vendor_broken gives a str; it"),
    "variant": (
        "def variant(option): return {'x': 1}[option]",
        "backend broken: variant('') of vendor_broken failed: KeyError: ''",
    ),
    "variant-none": ("def variant(option): ...", "`variant` of vendor_broken gives nothing; it"),
    "refusal": (
        "from glm_core.errors import GlmCoreError\n"
        "def variant(option): raise GlmCoreError('backend broken: name a card')",
        "backend broken: name a card",
    ),
    "probe": (
        f"{BACKEND}def probe(): raise RuntimeError('driver 3 < 4')\n"
        "backend = Backend(name='broken', device_type='cpu', verified='', probe=probe)",
        "its probe failed: RuntimeError: driver 3 < 4",
    ),
    "device": (
        f"{BACKEND}backend = Backend(name='broken', device_type='acme', verified='')",
        "torch knows no device 'acme'; import the package that registers it",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_third_party_backend_is_a_row_with_its_reason(
    kind: str, install: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reason = BROKEN[kind]
    monkeypatch.delitem(sys.modules, "vendor_broken", raising=False)
    install("broken", source + "\n")
    state = registry.probe("broken")
    assert not state.ok
    assert reason in state.reason
    cell = registry.table()["gelu"]["broken"]
    assert cell == ("reference" if kind in ("probe", "device") else f"unsupported: {state.reason}")
    with pytest.raises(GlmCoreError, match=re.escape(reason)):
        registry.usable("broken")
    for command in ("devices", "ops"):
        assert main([command]) == 0
    assert reason in capsys.readouterr().out
    assert "broken" not in align.usable(["float32"])


def test_interceptors_see_every_call_and_are_restored() -> None:
    calls = []

    def spy(op: dispatch.Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append((op.name, len(args), sorted(kwargs)))
        return dispatch.run(op, args, kwargs)

    with use(toy()) as session:
        with dispatch.intercept(spy):
            assert torch.equal(ops.rms_norm(*EVEN, eps=1e-6), EVEN[0] * 3)
            with dispatch.intercept(None):
                ops.rms_norm(*EVEN)
            ops.rms_norm(*ODD)
        ops.rms_norm(*EVEN)
    assert calls == [("rms_norm", 2, ["eps"]), ("rms_norm", 2, [])]
    assert sum(session.fallbacks.values()) == 1


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_code_records_its_fallbacks_when_traced(fresh_compiler: None) -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight) + ops.gelu(x)

    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with use(toy()) as session:
        for _ in range(2):
            torch.testing.assert_close(compiled(*EVEN), model(*EVEN))
    assert session.compiled == {Fallback("toy", "gelu", "no kernel for this op"): 1}
    assert session.fallbacks == {Fallback("toy", "gelu", "no kernel for this op"): 2}  # model's own


def test_compiled_code_follows_the_active_backend(fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w), fullgraph=True, backend="eager")
    results = []
    for factor in (2.0, 5.0):
        with use(toy(f"toy{factor}", factor)):
            results.append(compiled(*EVEN))
    results.append(compiled(*EVEN))
    assert torch.equal(results[0], EVEN[0] * 2)
    assert torch.equal(results[1], EVEN[0] * 5)
    assert torch.equal(results[2], ops.rms_norm.reference(*EVEN))


def test_compiled_code_is_recorded_by_every_session_that_runs_it(fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend="eager")
    backend = toy()
    for _ in range(3):
        with use(backend) as session:
            compiled(EVEN[0])
        assert session.compiled == {Fallback("toy", "gelu", "no kernel for this op"): 1}


def test_compiled_code_is_refused_by_a_later_strict_use(fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend="eager")
    backend = toy()
    with use(backend):
        compiled(EVEN[0])
    with use(backend, strict=True), pytest.raises(Exception, match="op gelu on backend toy"):
        compiled(EVEN[0])


def test_compiled_code_is_refused_under_strict(fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend="eager")
    with use(toy(), strict=True), pytest.raises(Exception, match="op gelu on backend toy"):
        compiled(EVEN[0])


def _renamed(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    return x


def _other_default(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x


def _reordered(weight: Tensor, x: Tensor, eps: float = 1e-5) -> Tensor:
    return x


def _too_few(x: Tensor, weight: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("wrong", [_renamed, _other_default, _reordered, _too_few])
def test_other_signatures_are_refused_for_kernels_and_predicates(wrong: Any) -> None:
    backend = Backend(name="toy", device_type="cpu", verified="in this test")
    fact = "backend toy, op rms_norm: parameters must be .*eps.*; received "
    with pytest.raises(TypeError, match=fact):
        backend.implements(ops.rms_norm)(wrong)
    with pytest.raises(TypeError, match=fact):
        backend.implements(ops.rms_norm, wrong)(ops.rms_norm.reference)
    assert not backend.kernels


def test_plugins_are_searched_once_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search costs more than the decoding of a token."""
    registry.names()
    monkeypatch.setattr(registry.metadata, "entry_points", lambda **_: pytest.fail("searched"))
    with registry.use("reference"):
        assert "cpu" in registry.names()
