"""Names of source files, and files that the modules do not hold."""

import json

import pytest

from kvmnest.coverage import build
from kvmnest.errors import UsageError
from kvmnest.kernel.source import KernelSource

RELEASE = "7.3.4-amd64"
FILES = ("vmx/nested.c", "svm/nested.c", "vmx/vmx.c", "mmu/mmu.c")


@pytest.fixture(autouse=True)
def kernel(tmp_path, monkeypatch):
    """A kernel of which the names of some sources are there."""
    for name in FILES:
        path = tmp_path / "arch/x86/kvm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = KernelSource(RELEASE, "7.3.4-1", tmp_path, tmp_path, "gcc", "key")
    monkeypatch.setattr("kvmnest.kernel.source.prepare", lambda release: found)


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ([], ["arch/x86/kvm/vmx/nested.c", "arch/x86/kvm/vmx/vmx.c"]),
        (["mmu.c"], ["arch/x86/kvm/mmu/mmu.c"]),
        (["vmx/nested.c", "./vmx/vmx.c"], ["arch/x86/kvm/vmx/nested.c", "arch/x86/kvm/vmx/vmx.c"]),
        (["arch/x86/kvm/vmx/vmx.c", "vmx.c"], ["arch/x86/kvm/vmx/vmx.c"]),
    ],
)
def test_names(given, full):
    assert build.full_names(given, RELEASE) == full


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nested.c", r"it is arch/x86/kvm/svm/nested\.c or arch/x86/kvm/vmx/nested\.c"),
        ("ested.c", "it is not a C file of arch/x86/kvm"),
        ("vmx/nested.h", "it is not a C file"),
        ("", "it is not a C file"),
    ],
)
def test_names_of_no_file_or_several(name, told):
    with pytest.raises(UsageError, match=told):
        build.full_names([name], RELEASE)


def test_a_source_that_is_in_neither_module(tmp_path, monkeypatch):
    """Such as AMD's: kvm-amd.ko is not built."""
    name = "arch/x86/kvm/svm/nested.c"
    nothing = {name: {"lines": [], "functions": [], "places": []}}
    (tmp_path / "sources.json").write_text(json.dumps(nothing))
    monkeypatch.setattr("kvmnest.lab.cache.entry", lambda *_, **__: tmp_path)
    with pytest.raises(UsageError, match=r"svm/nested\.c: no code of it is in kvm\.ko"):
        build.build([name], RELEASE)
