"""kvmnest trace: what it shows of a case that runs in the lab, and of wrong names."""

import json

import pytest

from kvmnest.cli.main import main
from kvmnest.trace.show import flags, lines

RESUME = "test_vmlaunch_vmresume.py::test_vmresume_of_clear_vmcs"


def test_case_in_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    """Its instructions in order, RFLAGS, the error, L2's instruction, the exit."""
    assert main(["trace", "--target", "lab", "--json", RESUME]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["case"], found["outcome"]) == (1, RESUME, "passed")
    executed = [command["op"] for command in found["commands"] if "status" in command]
    assert executed == ["vmxon", "vmclear", "vmptrld", "vmresume", "vmlaunch"]
    text = "\n".join(lines(found["commands"]))
    assert "VMfailValid; RFLAGS CF PF AF ZF SF OF -> ZF" in text
    assert "VM_INSTRUCTION_ERROR is 5: VMRESUME" in text
    assert "vmcall" in text
    assert "VMCALL (18)" in text
    assert "fields of the baseline" in text
    assert "GUEST_CR0" not in text
    assert "GUEST_CR0" in "\n".join(lines(found["commands"], every=True))


def test_flags() -> None:
    assert flags(0x41) == "CF ZF"
    assert flags(0x2) == "-"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_vmxon.py", "is not one case"),
        ("test_vmxon.py::test_nothing", "no such case"),
        ("nothing.py::test_x", "no such case"),
    ],
)
def test_wrong_name(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--target", "lab", name]) in (2, 3)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
