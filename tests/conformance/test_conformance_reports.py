"""The reports that are printed and written, and the cases in a vendor's own test suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.conformance import render
from glm_core.conformance.report import Report, Result
from glm_core.conformance.run import run

ROOT = Path(__file__).parents[2]


def toy(**facts: Any) -> Backend:
    """A backend of this test with no kernels."""
    chosen = {"dtypes": (torch.float32,), **facts}
    return Backend(name="toy", device_type="cpu", verified="in this test", **chosen)


def only(report: Report) -> Result:
    [result] = report.results
    return result


@pytest.fixture(scope="module")
def report() -> Report:
    """A report with one case of each outcome."""
    backend = toy()

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        if x.shape[-1] == 33:
            raise RuntimeError("a <b> & 'c', 100%\x00")
        return ops.gelu.reference(x)

    parts = [run(backend, op=op, mode="test", real=False) for op in ("gelu", "swiglu")]
    return Report("toy", [r for p in parts for r in p.results], parts[0].machine)


def test_what_was_left_out_is_said_in_every_report() -> None:
    report = run("reference", id="gelu-float32-*-test", skip=["*-8x13696-*"])
    assert "left out by --skip: *-8x13696-*" in render.text(report)
    assert "left out: *-8x13696-*" in render.page(report)
    assert report.to_json()["left_out"] == ["*-8x13696-*"]


def test_json_has_the_promised_names(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] == report.count("pass") > 0
    assert data["failed"] == len(report.failed) == 2
    assert data["unsupported"] == report.count("unsupported") > 0
    assert data["xfailed"] == 0
    assert len(data["cases"]) == sum(
        data[k] for k in ("passed", "failed", "unsupported", "xfailed")
    )
    assert set(data["cases"][0]) == {"id", "outcome", "error_ratio", "reason"}
    assert {"cpu", "torch", "commit"} <= set(data["machine"])


def test_text_prints_the_command_that_reruns_each_failure(report: Report) -> None:
    text = render.text(report)
    for failed in report.failed:
        assert f"FAIL {failed.id}\n" in text
        assert f"glm-core conformance --backend toy --id {failed.id}" in text
    assert "unsupported (8): no kernel for this op" in text


def test_junit_is_xml_with_failures_and_skips(report: Report) -> None:
    suite = ElementTree.fromstring(render.junit(report))
    assert int(suite.get("tests", 0)) == len(report.results) == len(suite)
    assert int(suite.get("failures", 0)) == len(suite.findall("testcase/failure")) == 2
    assert int(suite.get("skipped", 0)) == len(suite.findall("testcase/skipped")) == 8
    assert "a <b> & 'c', 100%" in suite.findall("testcase/failure")[0].get("message", "")


def test_github_annotations_escape_what_github_reads(report: Report) -> None:
    lines = render.github(report).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::error title=toy%3A gelu-float32-3x7x33-test::RuntimeError: a <b>")
    assert "100%25" in lines[0]
    assert "%0Aglm-core conformance --backend toy --id " in lines[0]


def test_page_is_self_contained_and_escaped(report: Report) -> None:
    page = render.page(report)
    assert "a &lt;b&gt; &amp; " in page
    assert "<b>" not in page
    assert "http" not in page.replace("https://", "http://").partition("<body>")[0]
    assert "src=" not in page
    for result in report.results:
        assert result.id in page


def test_perf_measures_with_units() -> None:
    result = only(run("reference", id="swiglu-float32-8x13696-perf"))
    assert result.outcome == "pass"
    assert result.error_ratio is None
    assert result.measured["forward_ms"] > 0
    assert result.measured["forward_backward_ms"] > result.measured["forward_ms"] * 0.5
    assert 0.2 < result.measured["forward_times_faster_than_reference"] < 5


VENDOR_TEST = """
import torch
from glm_core.backends.base import Backend
from glm_core import ops
from glm_core.conformance.plugin import conformance

@conformance("acme", op="gelu", mode="test", dtypes=[torch.float32], known_failures="known.txt")
def test_acme(case):
    case.check()

@conformance("reference:nonsense")
def test_absent(case):
    case.check()
"""

VENDOR = """
import torch
from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.spec import SUPPORTED, unsupported
backend = Backend(name="acme", device_type="cpu", verified="in a test")
def supports(x):
    return SUPPORTED if x.is_contiguous() else unsupported("x has gaps")
@backend.implements(ops.gelu, supports)
def gelu(x):
    return ops.gelu.reference(x) * {3: 2, 2: 3}.get(x.dim() * (x.shape[-1] in (33, 48)), 1)
"""


def test_a_vendors_own_package_runs_the_cases(tmp_path: Path) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[glm_core.backends]\nacme = vendor_acme\n")
    (tmp_path / "vendor_acme.py").write_text(VENDOR)
    (tmp_path / "test_vendor.py").write_text(VENDOR_TEST)
    (tmp_path / "known.txt").write_text("gelu-*-2x5x48-test doubled\nnone-such gone\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "."]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "COLUMNS": "200"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PASSED test_vendor.py::test_acme[acme-gelu-float32-1x1-test]" in done.stdout
    assert "FAILED test_vendor.py::test_acme[acme-gelu-float32-3x7x33-test]" in done.stdout
    assert "rerun: glm-core conformance --backend acme --id gelu-float32-3x7x33-test" in done.stdout
    assert "x has gaps" in done.stdout
    assert "XFAIL test_vendor.py::test_acme[acme-gelu-float32-2x5x48-test] - doubled" in done.stdout
    assert "known failure 'none-such' fits no case; remove it" in done.stdout
    assert "torch cannot use device 'nonsense'" in done.stdout
