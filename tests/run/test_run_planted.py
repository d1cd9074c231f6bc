"""A module of KVM that warns, run in the lab: the case fails although its assertions hold."""

import json
import shutil

import pytest

from kvmnest.cli.main import main
from kvmnest.kernel.build import build_modules
from kvmnest.kernel.edits import Edit
from kvmnest.lab import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]

CASE = "test_vmlaunch_vmresume.py::test_vmlaunch_enters_l2_and_vmcall_exits"
_CHECK = "if (!nested_vmx_check_permission(vcpu))"
_WARNS = Edit(
    "arch/x86/kvm/vmx/nested.c",
    "nested_vmx_run",
    _CHECK,
    f'WARN_ONCE(1, "kvmnest: planted"); {_CHECK}',
)


@pytest.mark.parametrize("kernel", ["6.1", "newest"])
def test_a_warning_fails_a_case_whose_assertions_hold(tmp_path, kernel):
    release = kernels.resolve(kernel).release

    def case_with(edits):
        modules, results = build_modules(edits, release), tmp_path / "out.json"
        arguments = [f"--kernel={kernel}", f"--kvm-modules={modules}", f"--json={results}"]
        code = main(["run", "-q", "--target=lab", *arguments, "-j1", CASE])
        (case,) = json.loads(results.read_text())["cases"]
        return code, case

    code, case = case_with([_WARNS])
    assert (code, case["outcome"]) == (1, "failed")
    assert case["summary"].startswith("the kernel reported: WARNING: ")
    assert "vmx/nested.c:" in case["summary"]
    assert "kvmnest: planted" in case["detail"]
    assert "Call Trace:" in case["detail"]
    code, case = case_with([])
    assert (code, case["outcome"]) == (0, "passed")
    assert "WARNING" not in case.get("kernel_log", "")
