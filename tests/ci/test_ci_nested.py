"""ci/nested: reloads kvm_intel only when nothing uses it, and puts everything back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(nested, kernel, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    places = nested.Places(kernel.module, kernel.proc, kernel.state)

    def run(*argv):
        code = nested.main(argv, places)
        out, err = capsys.readouterr()
        return code, out.strip(), err.strip()

    return run


def test_on_and_restore_reload_the_module_and_keep_its_other_parameters(call, kernel):
    shutil.rmtree(kernel.module)
    # ept=N was given by hand, so the first reload loses it; what follows from it shows in words.
    by_hand = {"ept": "N", "ple_gap": "128", "vmentry_l1d_flush": "EPT disabled"}
    kernel.load(nested="N", **by_hand)
    assert call("check") == (3, "", "nested: kvm_intel has nested=N: sudo ci/nested on")
    assert call("on") == (0, "nested: reloaded kvm_intel with nested=1 (was N)", "")
    assert kernel.parameters() == {"nested": "Y", **by_hand}
    assert call("check") == (0, "nested: kvm_intel has nested=Y", "")
    assert call("restore") == (0, "nested: kvm_intel is as it was: nested=N", "")
    assert kernel.parameters() == {"nested": "N", **by_hand}
    assert not kernel.state.exists()
    assert call("restore") == (0, "nested: nothing to restore", "")


def test_nothing_is_touched_where_it_is_on_already(call, kernel):
    (kernel.module / "parameters" / "nested").write_text("1\n")
    assert call("on")[0] == 0
    assert call("restore") == (0, "nested: nothing to restore", "")
    assert kernel.log() == []


@pytest.mark.parametrize("verb", ["on", "restore"])
def test_it_refuses_while_vms_run_and_names_them(call, kernel, verb):
    if verb == "restore":
        call("on")
    before, log = kernel.parameters(), kernel.log()
    (kernel.module / "refcnt").write_text("2\n")
    kernel.hold(41, "bash", "/dev/null")
    kernel.hold(4711, "qemu-system-x86", "anon_inode:kvm-vm")
    code, _, error = call(verb)
    assert code == 3
    assert error == (
        "nested: kvm_intel is in use: qemu-system-x86 (pid 4711); stop the VMs first,"
        " nothing was changed"
    )
    assert (kernel.parameters(), kernel.log()) == (before, log)
    (kernel.module / "refcnt").write_text("0\n")
    assert call(verb)[0] == 0


def test_a_second_on_does_not_forget_what_was_first(call, kernel):
    assert call("on")[0] == 0
    (kernel.module / "parameters" / "nested").write_text("N\n")  # somebody else reloaded it
    assert call("on")[0] == 0
    assert json.loads(kernel.state.read_text())["parameters"]["nested"] == "N"
    assert oct(kernel.state.stat().st_mode)[-3:] == "600"
    assert call("restore")[0] == 0
    assert kernel.parameters()["nested"] == "N"


def test_a_module_that_was_not_loaded_is_unloaded_again(call, kernel):
    shutil.rmtree(kernel.module)
    assert call("on") == (0, "nested: loaded kvm_intel with nested=1", "")
    assert call("restore") == (0, "nested: kvm_intel is as it was: not loaded", "")
    assert not kernel.module.exists()


def test_an_on_that_died_between_unloading_and_loading_is_undone(call, kernel):
    call("on")
    shutil.rmtree(kernel.module)
    assert call("restore")[0] == 0
    assert kernel.parameters()["nested"] == "N"


def test_a_kernel_that_takes_no_nested_gets_its_module_back(call, kernel):
    (kernel.root / "rejected").write_text("nested=1")
    code, _, error = call("on")
    assert code == 3
    assert "Invalid argument" in error
    assert "loaded with its defaults" in error
    assert kernel.parameters()["nested"] == "N"


@pytest.mark.parametrize(
    ("spoil", "say"),
    [
        (lambda k: (k.module / "initstate").unlink(), "boot with kvm_intel.nested=1"),
        (lambda k: (k.module / "refcnt").unlink(), "cannot unload modules"),
        (lambda k: (k.proc / "cpuinfo").write_text("flags : fpu svm\n"), "this CPU has no VMX"),
        (lambda k: shutil.rmtree(k.root / "bin"), "rmmod is not installed"),
        (lambda k: k.state.with_suffix(".lock").symlink_to("x"), "symbolic"),
    ],
)
def test_what_is_in_the_way_is_one_line(call, kernel, spoil, say):
    spoil(kernel)
    code, out, error = call("on")
    assert (code, out) == (3, "")
    assert say in error
    assert len(error.splitlines()) == 1
    assert kernel.parameters()["nested"] == "N"


def test_a_broken_state_is_named(call, kernel):
    kernel.state.write_text("[]")
    code, _, error = call("restore")
    assert code == 3
    assert str(kernel.state) in error


def test_others_than_root_are_told_so(call, kernel, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert call("on") == (3, "", "nested: root is needed: sudo ci/nested on")
    assert call("check")[0] == 3
    assert kernel.log() == []


def test_run_restores_after_the_command_whatever_became_of_it(call, kernel, tmp_path):
    seen = tmp_path / "seen"
    parameter = kernel.module / "parameters" / "nested"
    copy = f"import shutil; shutil.copy({str(parameter)!r}, {str(seen)!r})"
    assert call("run", "--", sys.executable, "-c", f"{copy}; raise SystemExit(7)")[0] == 7
    assert seen.read_text() == "Y\n"
    assert kernel.parameters()["nested"] == "N"
    code, _, error = call("run", "--", "/no/such/command")
    assert (code, error) == (3, "nested: /no/such/command: No such file or directory")
    assert kernel.parameters()["nested"] == "N"


def test_this_machine_gets_one_line(tmp_path):
    """The real /sys and /proc, whatever they are."""
    done = subprocess.run(
        [str(ROOT / "ci" / "nested"), "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3)
    assert len((done.stdout + done.stderr).splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["off"], ["run"]])
def test_wrong_usage(nested, argv):
    with pytest.raises(SystemExit) as ended:
        nested.main(argv)
    assert ended.value.code == 2
