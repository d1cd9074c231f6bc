"""Fixtures on the real /dev/kvm, failure output, events, known deviations."""

import subprocess

import pytest
from plugin_helpers import results, run_events, run_pytest

from kvmnest.kvm import Kvm, KvmUnavailable


@pytest.fixture(autouse=True, scope="module")
def needs_kvm():
    try:
        Kvm().close()
    except KvmUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def no_kvm_prefix():
    """A command prefix under which /dev/kvm is no KVM."""
    prefix = ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a mount namespace needs root")
    return prefix


def test_fixtures(module):
    folder = module(
        """
def test_kvm(kvm):
    assert kvm.api_version == 12
def test_vm(kvm, vm):
    with vm.create_vcpu(0) as vcpu:
        assert vcpu.get_regs().rflags == 2
@pytest.mark.parametrize("n", [1, 2])
def test_l1(kvm, l1, n):
    assert l1.kvm is kvm
    assert not l1.log
    assert l1.cpuid(0)
    assert l1.budget.seconds == 7
""",
        suite=False,
    )
    done = run_pytest(folder, "--kvmnest-budget=7")
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_failure_says_what_one_needs(module):
    folder = module(
        """
from kvmnest.vmx import ExitReason, VmxError
from kvmnest.vmx.outcome import Exit, Fault, VMfailValid
def test_wrong(l1):
    assert l1.cpuid(0) == Fault(6)
def test_exit():
    assert Exit(ExitReason.CR_ACCESS, qualification=0x10) == Exit(ExitReason.CR_ACCESS, 0x13)
def test_unlike():
    assert VMfailValid(VmxError(5)) == Exit(ExitReason.VMCALL)
""",
        suite=False,
    )
    done = run_pytest(folder)
    out = done.stdout
    assert "expected Fault(vector=0x6)" in out
    assert "last commands of 1:" in out
    assert "  cpuid " in out
    assert "kernel " in out
    assert "kvm_intel" in out
    assert "rerun: pytest test_sample.py::test_wrong" in out
    assert "Exit of CR_ACCESS: qualification: got 0x10, expected 0x13" in out
    assert "CR_ACCESS (28), MOV CR0 to rax" in out
    assert "got VMfailValid(5: " in out
    # Header: what decides over results.
    assert "kvmnest: 0." in out


def test_harness_errors_are_not_failures(module):
    folder = module(
        """
from kvmnest.errors import HarnessError
from kvmnest.kvm import KvmError
from kvmnest.l1 import VmLost
def test_harness(l1): raise HarnessError("ours")
def test_lost(l1): raise VmLost("hang", "no end", "vmlaunch", {"rip": 1})
def test_kvm(kvm, vm):
    vm.create_vcpu(0)
    vm.create_vcpu(0)
@pytest.fixture
def broken(kvm): raise HarnessError("ours")
@pytest.fixture
def lost(kvm): raise VmLost("hang", "no end", "vmlaunch", {"rip": 1})
def test_setup(broken): pass
def test_lost_in_setup(lost): pass
@pytest.fixture
def late(kvm):
    yield
    raise ValueError("late")
def test_teardown(late): pass
def test_both(late): assert 0
""",
        suite=False,
    )
    found = results(run_events(folder))
    assert {name: event["outcome"] for name, event in found.items()} == {
        "test_harness": "error",
        "test_lost": "failed",
        "test_kvm": "failed",
        "test_setup": "error",
        "test_lost_in_setup": "failed",
        "test_teardown": "error",
        "test_both": "failed",
    }
    assert found["test_lost"]["summary"].startswith("VmLost: hang in vmlaunch: no end")
    assert "KVM_CREATE_VCPU" in found["test_kvm"]["summary"]
    assert "then, in teardown" in found["test_both"]["detail"]


def test_without_kvm_tests_are_skipped_or_errors(module, no_kvm_prefix):
    folder = module("def test_it(kvm): assert kvm\n", suite=False)
    skipped = run_pytest(folder, "-rs", prefix=no_kvm_prefix)
    assert "1 skipped" in skipped.stdout
    assert "/dev/kvm is not KVM" in skipped.stdout
    required = run_pytest(folder, "--require-kvm", prefix=no_kvm_prefix)
    assert "1 error" in required.stdout


def test_events_in_order(module):
    folder = module("def test_a(kvm): assert 1\ndef test_b(kvm): assert 0\n", suite=False)
    events = run_events(folder)
    kinds = [event["e"] for event in events]
    assert kinds == ["session", "collected", "start", "result", "start", "result", "end"]
    session, collected = events[:2]
    assert session["kernel"]
    assert collected["count"] == 2
    assert collected["cases"] == [
        ["test_sample.py::test_a", None],
        ["test_sample.py::test_b", None],
    ]
    assert events[-1]["status"] == 1


def test_ids_of_the_suite_are_short(module):
    folder = module('@pytest.mark.parametrize("n", [7])\ndef test_a(n): assert n\n')
    events = run_events(folder.parent, str(folder / "test_sample.py"))
    start = next(event for event in events if event["e"] == "start")
    assert start == {
        "e": "start",
        "id": "test_sample.py::test_a[7]",
        "series": 3,
        "sdm": "A section",
    }


def test_a_file_that_does_not_load_is_an_event(tmp_path):
    (tmp_path / "test_sample.py").write_text("import no_such_module_at_all\n")
    broken = [event for event in run_events(tmp_path) if event["e"] == "broken"]
    assert "no_such_module_at_all" in broken[0]["detail"]


def test_shuffle_is_seeded_and_from_skips(module):
    folder = module(
        '@pytest.mark.parametrize("n", range(20))\ndef test_a(n): assert 1\n', suite=False
    )

    def order(*arguments):
        return [e["id"] for e in run_events(folder, *arguments) if e["e"] == "start"]

    plain, once = order(), order("--kvmnest-shuffle=5")
    assert once != plain
    assert sorted(once) == sorted(plain)
    assert order("--kvmnest-shuffle=5") == once
    assert order("--kvmnest-shuffle=6") != once
    assert order("--kvmnest-shuffle=5", "--kvmnest-from=15") == once[15:]


def test_known_deviations_under_plain_pytest(module):
    folder = module(
        "def test_listed_fails(): assert 0\ndef test_listed_passes(): assert 1\n"
        "def test_other(): assert 0\n"
    )
    (folder / "known.toml").write_text(
        '[[deviation]]\ncase = "test_sample.py::test_listed_*"\nreason = "seen everywhere"\n'
        'upstream = "KVM: fix it"\n'
    )
    (folder / "conftest.py").write_text(
        "import pathlib\nfrom kvmnest import known\nfrom kvmnest.plugin import policy\n"
        "known.KNOWN_FILE = pathlib.Path(__file__).parent / 'known.toml'\n"
        "policy.require = lambda item: None\n"
    )
    out = run_pytest(folder, "-rx").stdout
    assert "1 failed, 1 passed, 1 xfailed" in out
    assert 'seen everywhere (upstream: "KVM: fix it")' in out
    assert "known deviations that no longer happen" in out
    assert "test_sample.py::test_listed_passes: seen everywhere" in out
