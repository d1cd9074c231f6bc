"""One mutant for real: built from Debian's source, run in the lab, noticed by the suite."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.kernel import build
from kvmnest.kernel.edits import Edit, EditError
from kvmnest.lab import kernels
from kvmnest.lab.errors import LabSetupError
from kvmnest.mutants import catalogue

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]

NESTED = "arch/x86/kvm/vmx/nested.c"


@pytest.fixture(scope="module")
def release() -> str:
    """The lab's default kernel."""
    return kernels.resolve(None).release


@pytest.mark.parametrize("kernel", ["6.1", "newest"])
def test_detected_then_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    state, report = tmp_path / "state.json", tmp_path / "report.json"
    only = ["--only", "vmxon-cpl3,ibpb-nested-exit"]
    arguments = ["mutants", *only, "--kernel", kernel, "--state", str(state)]
    assert main([*arguments, "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert "vmxon-cpl3: detected test_vmxon.py::" in said
    assert f"2 mutants of {kernels.resolve(kernel).release}: " in said
    assert ": 1 detected, 1 masked" in said
    document = json.loads(report.read_text())
    assert document["totals"] == {"detected": 1, "missed": 0, "masked": 1, "does not apply": 0}

    def no_build(*_: object) -> Path:
        raise AssertionError("a score that is known was scored again")

    monkeypatch.setattr("kvmnest.mutants.score.build_modules", no_build)
    assert main(arguments) == 0


def test_nothing_is_built_twice(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Edit(NESTED, "handle_vmxon", "if (vmx_get_cpl(vcpu)) {", "if (0) {")
    first = build.build_modules([edit], release)
    assert sorted(path.name for path in first.glob("*.ko")) == ["kvm-intel.ko", "kvm.ko"]
    monkeypatch.setattr("kvmnest.kernel.build._make", None)
    assert build.build_modules([edit], release) == first


@pytest.mark.parametrize("kernel", ["6.1", "newest"])
def test_every_edit_fits_the_kernel(kernel: str) -> None:
    kernel_release = kernels.resolve(kernel).release
    mutants = [m for m in catalogue.load() if m.exists_on(kernel_release)]
    edits = [mutant.edit_for(kernel_release) for mutant in mutants]
    assert len(edits) >= 170
    build.check_edits(edits, kernel_release)


def test_edits_that_cannot_be_built(release: str) -> None:
    with pytest.raises(EditError, match="does not occur"):
        build.check_edits([Edit(NESTED, "handle_vmxon", "no such words", "")], release)
    edit = Edit(NESTED, "nested_vmx_check_permission", "if (vmx_get_cpl(vcpu)) {", "if (]) {")
    with pytest.raises(build.BuildError, match=r"nested\.c:\d+:\d+: error: "):
        build.build_modules([edit], release)


def test_kernel_that_is_not_debians() -> None:
    with pytest.raises(LabSetupError, match=r"apt knows no linux-headers-6\.1\.99-mine"):
        build.build_modules([], "6.1.99-mine")


def test_cases_that_fail_on_the_unmodified_modules_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    # The modules taken for unmodified ones hold a bug.
    broken = Edit(NESTED, "handle_vmxon", "if (vmx_get_cpl(vcpu)) {", "if (0) {")
    folder = build.build_modules([broken], release)
    monkeypatch.setattr("kvmnest.mutants.score.build_modules", lambda *_: folder)
    from kvmnest.mutants import record, score

    results = record.load(tmp_path / "state.json", release)
    lines: list[str] = []
    scorer = score.Scorer(None, release, results, first_only=True, on_line=lines.append)
    (mutant,) = catalogue.select(catalogue.load(), "vmxon-cpl3")
    with pytest.raises(HarnessError, match="cases fail on the unmodified modules"):
        scorer.score([mutant], 1)
    assert results.scores == {}
    # With another case beside, which passes, there is one to judge by, and the rest does not count.
    other = replace(mutant, cases=(*mutant.cases, "test_vmxon.py::test_vmxon_without_cr4_vmxe*"))
    scorer.score([other], 1)
    assert results.scores["vmxon-cpl3"].verdict == record.MISSED
    assert any(line.startswith("not used, since it fails on the unmod") for line in lines)
