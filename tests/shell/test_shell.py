"""kvmnest shell, fed through a pipe."""

import subprocess
import sys

from kvmnest.shell.namespace import CODE_LINE, Namespace
from kvmnest.shell.prompt import Output

SESSION = """\
l1.vmxon()
l1.vmxoff()
v = l1.launchable(l2=code.CPUID)
vmcs[Field.GUEST_RFLAGS] = 0
rules()
l1.vmlaunch()
vmcs[Field.GUEST_RFLAGS] = 2
l1.vmlaunch() == Exit(ExitReason.CPUID)
dump("VM_EXIT_R*")
dis(count=1)
for register in (1, 2):
    print("register", register)

1 / 0
def broken(:
print("still", "here")
"""


def shell(*arguments: str, source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmnest.cli.main", "shell", *arguments],
        input=source,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_in_the_lab(prepared: None) -> None:
    """Instructions, the VMCS, rules, code, blocks; errors are shown and the shell continues."""
    done = shell("--target", "lab", source=SESSION)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["Succeed()", "Succeed()"]
    assert lines[2].startswith("GUEST: ")
    assert "bit 1 of RFLAGS must be 1" in lines[2]
    assert lines[3] == "EntryFailure(reason=INVALID_GUEST_STATE, qualification=0x0)"
    assert lines[4] == "True"
    assert lines[5].startswith("VM_EXIT_REASON")
    assert "CPUID" in lines[5]
    assert "cpuid" in lines[6]
    assert lines[7:9] == ["register 1", "register 2"]
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "SyntaxError" in done.stdout
    assert lines[-1] == "still here"
    assert done.stderr == ""


def test_single_steps() -> None:
    """Each step is one instruction of L2."""
    source = "v = l1.launchable(l2=code.NOP + code.NOP + code.CPUID)\n"
    source += "r = [hex(step().rip - l1.sym('l2_code')) for _ in range(2)]\nr\nstep().reason\n"
    done = shell("--target", "lab", source=source)
    assert "['0x1', '0x2']" in done.stdout
    assert "CPUID" in done.stdout.splitlines()[-1]


def test_here_without_vmx() -> None:
    """The same names on this machine's /dev/kvm, which may have no VMX."""
    found: list[str] = []
    space = Namespace(found.append)
    try:
        space.run("value = l1.rdmsr(0x1b)\n")
        assert type(space.names["value"]).__name__ == "Succeed"
        space.run("dis(l1.sym('insn_nop'), 1)\n")
        space.run("new().rdtsc()\n")
        space.run("nonsense\n")
    finally:
        space.close()
    assert found[0].startswith(CODE_LINE)
    assert "NameError" in found[-1]


def test_target_that_does_not_do() -> None:
    done = shell("--target", "kvm", "--kernel", "6.1", source="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_code_lines_are_disassembled() -> None:
    found: list[str] = []
    output = Output(found.append)
    output.feed(f"a\n{CODE_LINE} 0x10 64 2 0fa2")
    output.feed("0f01c1\nb")
    output.flush()
    text = "".join(found)
    assert text.startswith("a\n0x10  cpuid\n0x12  vmcall")
    assert text.endswith("b")
