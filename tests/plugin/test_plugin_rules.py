"""The rules that cases of the suite are held to."""

import pytest
from plugin_helpers import results, run_events, run_pytest


def test_every_case_needs_series_and_sdm(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        'import pytest\n__name__ = "kvmnest.suite.test_sample"\n'
        "def test_bare(): assert True\n"
        "@pytest.mark.series(25)\n@pytest.mark.sdm('')\ndef test_wrong(): assert True\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_sample.py::test_bare: no series(n) marker" in done.stdout
    assert "test_sample.py::test_bare: no sdm(title) marker" in done.stdout
    assert "test_wrong: series(25) is not a number from 1 to 24" in done.stdout
    assert "test_sample.py::test_wrong: no sdm(title) marker" in done.stdout


def test_a_reproducer_needs_sdm_only(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        'import pytest\n__name__ = "kvmnest.repro.bugs.sample"\n'
        "def test_bare(): assert True\n"
        "@pytest.mark.sdm('A section')\ndef test_right(): assert True\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_sample.py::test_bare: no sdm(title) marker" in done.stdout
    assert "no series" not in done.stdout
    assert "test_right" not in done.stdout


def test_what_an_error_was_is_told_from_a_failed_assertion(module):
    """A reproducer that raises something proves nothing; one that asserts does."""
    folder = module(
        "def test_asserts(vm): assert 1 == 2\ndef test_fails(vm): pytest.fail('x')\n"
        "def test_raises(vm): raise OSError('x')\ndef test_passes(vm): pass\n",
        suite=False,
    )
    (folder / "conftest.py").write_text("import pytest\n@pytest.fixture\ndef vm(): return None\n")
    raised = {name: event.get("raised") for name, event in results(run_events(folder)).items()}
    assert raised == {
        "test_asserts": "",
        "test_fails": "",
        "test_raises": "OSError",
        "test_passes": None,
    }


def test_broken_rules_are_an_event(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        '__name__ = "kvmnest.suite.test_sample"\ndef test_bare(): assert True\n'
    )
    broken = [e for e in run_events(tmp_path) if e["e"] == "broken"]
    assert "no series(n) marker" in broken[0]["detail"]


def test_a_test_of_a_user_needs_nothing(module):
    done = run_pytest(module("def test_free(): pass\n", suite=False))
    assert done.returncode == 0
    assert "1 passed" in done.stdout


def test_a_case_without_assertion_fails(module):
    folder = module(
        """
def check_value(value): assert value
def check_nothing(value): value
def helper(value): assert value
def test_asserts(): assert 1
def test_raises():
    with pytest.raises(ValueError): int("x")
def test_inner():
    def inner(): assert 1
    inner()
def test_by_helper(): check_value(1)
def test_by_empty_helper(): check_nothing(1)
def test_by_unnamed_helper(): helper(1)
def test_nothing(): pass
"""
    )
    # The suite's cases need VMX, which this machine may lack: look at what is found out before.
    (folder / "conftest.py").write_text(
        "from kvmnest.plugin import policy\npolicy.require = lambda item: None\n"
    )
    found = results(run_events(folder))
    wrong = {name for name, event in found.items() if event["outcome"] == "failed"}
    assert wrong == {"test_by_empty_helper", "test_by_unnamed_helper", "test_nothing"}
    assert found["test_nothing"]["summary"].startswith("this case asserts nothing")
    assert {e["outcome"] for name, e in found.items() if name not in wrong} == {"passed"}


def test_a_skip_needs_a_reason(module):
    folder = module(
        """
@pytest.mark.skip
def test_marked(): assert 1
@pytest.mark.skip(reason="later")
def test_marked_with_reason(): assert 1
def test_called():
    pytest.skip()
    assert 1
def test_called_with_reason():
    pytest.skip("no such bit")
    assert 1
"""
    )
    (folder / "conftest.py").write_text(
        "from kvmnest.plugin import policy\npolicy.require = lambda item: None\n"
    )
    found = results(run_events(folder))
    assert found["test_marked"]["outcome"] == "failed"
    assert found["test_called"]["outcome"] == "failed"
    assert found["test_called"]["detail"] == "this case skips without a reason"
    assert found["test_marked_with_reason"]["outcome"] == "skipped"
    assert found["test_called_with_reason"]["detail"] == "no such bit"


def test_kvm_param_names_the_parameter(module):
    folder = module(
        "@pytest.mark.kvm_param(no_such_parameter=True)\ndef test_it(): assert 1\n", suite=False
    )
    found = results(run_events(folder))
    assert found["test_it"]["outcome"] == "skipped"
    assert found["test_it"]["detail"] == (
        "needs kvm_intel.no_such_parameter=Y: no kvm_intel.no_such_parameter here"
    )


def test_needs_accepts_what_kvm_has_and_names_what_it_lacks(module):
    folder = module(
        """
from kvmnest.kvm import Cap
from kvmnest.cases.offer import HostOffer
from kvmnest.vmx import ProcCtl
@pytest.mark.needs(Cap.NR_VCPUS)
def test_there(): assert 1
@pytest.mark.needs(Cap.PPC_RMA)
def test_elsewhere(): assert 1
@pytest.mark.skipif(HostOffer().vmx, reason="VMX here")
@pytest.mark.needs(ProcCtl.MONITOR_TRAP_FLAG)
def test_vmx(): assert 1
""".replace("PPC_RMA", _absent_cap()),
        suite=False,
    )
    found = results(run_events(folder))
    assert found["test_there"]["outcome"] == "passed"
    assert found["test_elsewhere"]["outcome"] == "skipped"
    assert "KVM_CHECK_EXTENSION gives 0" in found["test_elsewhere"]["detail"]
    assert found["test_vmx"]["outcome"] == "skipped"
    text = found["test_vmx"]["detail"]
    assert text == "VMX here" or text.startswith("needs ProcCtl.MONITOR_TRAP_FLAG: no VMX here: ")


def _absent_cap() -> str:
    from kvmnest.kvm import Cap, Kvm

    with Kvm() as kvm:
        return next(cap.name for cap in Cap if not kvm.check_extension(cap))
