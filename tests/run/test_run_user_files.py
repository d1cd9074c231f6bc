"""Files of the user in the lab: they keep their names, and the boot is no part of a case."""

import json
import os
import shlex
from pathlib import Path

import pytest

from kvmnest.cli.main import main
from kvmnest.errors import UsageError
from kvmnest.run.lab_target import python_files, since

CASES = """\
def test_right(l1):
    from kvmnest.vmx.outcome import Succeed
    assert l1.vmxon() == Succeed()

def test_wrong(l1):
    from kvmnest.vmx.outcome import VMfailInvalid
    assert l1.vmxon() == VMfailInvalid()

def test_refused(l1):
    from kvmnest.vmx import Field
    from kvmnest.vmx.outcome import Exit
    vmcs = l1.launchable()
    vmcs[Field.GUEST_RFLAGS] = 0
    assert isinstance(l1.vmlaunch(), Exit)
"""


#: A deviation on every kernel to date: an entry of data/known.toml is about it.
KNOWN = "test_vmlaunch_vmresume.py::test_late_vmfail_leaves_control_registers[CR4-DE]"


@pytest.mark.parametrize("folder", ["sub", "."])
def test_names_are_the_users(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    file = Path(folder) / "test_mine.py"
    file.write_text(CASES)
    command = ["run", "--target", "lab", "-q", "--json", "out.json", str(file)]
    assert main([*command, KNOWN] if folder == "sub" else command) == 1
    found = json.loads(Path("out.json").read_text())
    if folder == "sub":  # a case of the suite keeps its name too, by which it is known
        suite = found["cases"].pop(0)
        assert (suite["id"], suite["outcome"]) == (KNOWN, "known")
    assert [(case["id"], case["outcome"]) for case in found["cases"]] == [
        (f"{file}::test_right", "passed"),
        (f"{file}::test_wrong", "failed"),
        (f"{file}::test_refused", "failed"),
    ]
    wrong, refused = found["cases"][1:]
    # A failed VM entry names the rule that objects; an instruction that is no entry has none.
    assert "bit 1 of RFLAGS must be 1 [GUEST_RFLAGS]" in refused["detail"]
    assert "rules of VM entry" not in wrong["detail"]
    assert f"{file}:7: in test_wrong" in wrong["detail"]
    assert shlex.split(wrong["rerun"])[-1] == f"{file}::test_wrong"
    # Bochs has no ACPI, and every boot says so, before the first case.
    assert [case for case in found["cases"] if "ACPI" in case.get("kernel_log", "")] == []


def test_kernel_messages_from_a_time_on() -> None:
    log = "[    0.800351] ACPI: none\n[    1.500000] WARNING: CPU: 0\ncontinued\n[   12.000000] x\n"
    assert since(log, 1.25) == log.partition("\n")[2]
    assert since(log, 0.0) == log


def test_what_lies_beside_a_test_file(tmp_path: Path) -> None:
    """Only regular files go into the lab: a FIFO would be waited for without an end."""
    test = tmp_path / "test_a.py"
    test.write_text("import helper\n")
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "dangling.py").symlink_to("nowhere")
    (tmp_path / "loop.py").symlink_to("loop.py")
    os.mkfifo(tmp_path / "fifo.py")
    wanted = {test, tmp_path / "helper.py"}
    assert python_files(test).keys() == wanted
    assert python_files(tmp_path).keys() == wanted
    assert python_files(tmp_path / "folder.py") == {}


@pytest.mark.parametrize("what", ["dangling", "fifo"])
def test_a_file_that_cannot_be_read(tmp_path: Path, what: str) -> None:
    path = tmp_path / "test_a.py"
    if what == "dangling":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)
    with pytest.raises(UsageError, match=r"cannot read .*test_a\.py: not a regular file"):
        python_files(path)
