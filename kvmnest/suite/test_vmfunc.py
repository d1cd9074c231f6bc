"""VMFUNC: EPTP switching in L2, and what makes it exit or fault instead."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.ept import RWX, WRITE_BACK, Window
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Proc2Ctl, Vector, VmFunc
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(17),
    pytest.mark.sdm("EPTP Switching"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.ENABLE_VM_FUNCTIONS, VmFunc.EPTP_SWITCHING),
]

LOAD = b"\x48\x8b\x1f"  # MOV RBX, [RDI]
ENTRIES = 512


class Views:
    """A guest with ``count`` EPT hierarchies in its EPTP list: the window shows another page.

    Page n holds the value n + 1; the guest starts with hierarchy 0.
    """

    def __init__(self, l1: L1, count: int = 3, *, function: int = VmFunc.EPTP_SWITCHING) -> None:
        self.l1 = l1
        self.guest = Guest(l1, Proc2Ctl.ENABLE_VM_FUNCTIONS, ept=True)
        self.window = Window(self.guest)
        self.pointers = [self._copy(number) for number in range(count)]
        for number, pointer in enumerate(self.pointers):
            l1.write_int(l1.sym("eptp_list") + 8 * number, pointer)
        vmcs = self.guest.vmcs
        vmcs[Field.EPT_POINTER] = self.pointers[0]
        vmcs[Field.VM_FUNCTION_CONTROL] = function
        vmcs[Field.EPTP_LIST_ADDRESS] = l1.sym("eptp_list")

    def _copy(self, number: int) -> int:
        """A hierarchy that differs in the window only; its EPT pointer."""
        l1, window = self.l1, self.window
        top = window.levels[-1]
        page = l1.alloc()
        l1.write_int(page, number + 1)
        lower = page | WRITE_BACK | RWX
        for _ in range(1, top):
            table = l1.alloc()
            l1.write_int(table, lower)
            lower = table | RWX
        root = l1.alloc()
        l1.write(root, l1.read(l1.sym("ept_pml4"), 4096))
        slot = window.entry(top)
        if top == 4:
            l1.write_int(root + slot % 4096, lower)
        else:
            upper = l1.alloc()
            l1.write(upper, l1.read(l1.sym("ept_pml4_pdpt"), 4096))
            l1.write_int(upper + slot % 4096, lower)
            l1.write_int(root, upper | RWX)
        return root | 0x1E

    def regs(self, index: int, function: int = 0) -> dict[str, int]:
        """Registers for VMFUNC and a load from the window."""
        return {"rax": function, "rcx": index, "rdi": self.window.linear}


def test_switch(l1: L1) -> None:
    """VMFUNC 0 makes the EPT pointer of the list the current one: L2 sees another page."""
    views = Views(l1)
    guest = views.guest
    for index in (1, 2, 0, 2, 1, 1, 0):
        seen = guest.run(code.VMFUNC + LOAD, views.regs(index))
        assert seen == Succeed(), index
        assert seen.regs["rbx"] == index + 1
        assert guest.changed(seen, "rbx") == {}
        # The EPT pointer of the VMCS follows, so the next entry starts with it.
        assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[index])
        seen = guest.run(LOAD, views.regs(0))
        assert seen.regs["rbx"] == index + 1


def test_switch_many_times_without_exit(l1: L1) -> None:
    """L2 goes through the list in one run; nothing of the old view is left over."""
    views = Views(l1)
    add = b"\x49\x6b\xd0\x0a" + b"\x4c\x8d\x04\x1a"  # IMUL RDX, R8, 10; LEA R8, [RDX+RBX]
    step = b"".join(
        bytes([0xB9, index, 0, 0, 0]) + code.VMFUNC + LOAD + add for index in (1, 2, 0, 1, 0, 2)
    )
    seen = views.guest.run(step, {**views.regs(0), "r8": 0})
    assert seen == Succeed()
    assert seen.regs["r8"] == 231213


def test_at_cpl_3(l1: L1) -> None:
    """VMFUNC is no privileged instruction: it switches at CPL 3, too."""
    views = Views(l1)
    views.guest.set_cpl(3)
    seen = views.guest.run(code.VMFUNC + LOAD, views.regs(1))
    assert seen == Succeed()
    assert seen.regs["rbx"] == 2


def test_switch_to_the_current_view(l1: L1) -> None:
    """A switch to the view in use changes nothing."""
    views = Views(l1)
    seen = views.guest.run(code.VMFUNC + LOAD, views.regs(0))
    assert seen == Succeed()
    assert seen.regs["rbx"] == 1
    assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[0])


@pytest.mark.sdm("VMFUNC - Invoke VM Function")
def test_function_not_enabled(l1: L1) -> None:
    """A VM function whose control bit is 0 exits with reason VMFUNC."""
    views = Views(l1)
    guest = views.guest
    for function in (1, 2, 31, 32, 63):
        seen = guest.run(code.VMFUNC + LOAD, views.regs(1, function))
        assert seen == guest.exit(ExitReason.VMFUNC, 3), function
        assert guest.changed(seen) == {}
        assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[0])
    seen = guest.go_on(skip=3)
    assert seen == Succeed()
    assert seen.regs["rbx"] == 1


@pytest.mark.sdm("VMFUNC - Invoke VM Function")
def test_switching_not_enabled(l1: L1) -> None:
    """EPTP switching itself exits while its control bit is 0."""
    views = Views(l1, function=0)
    guest = views.guest
    assert guest.run(code.VMFUNC, views.regs(1)) == guest.exit(ExitReason.VMFUNC, 3)
    guest.vmcs[Field.VM_FUNCTION_CONTROL] = VmFunc.EPTP_SWITCHING
    assert guest.run(code.VMFUNC, views.regs(1)) == Succeed()


@pytest.mark.sdm("VMFUNC - Invoke VM Function")
def test_function_above_63(l1: L1) -> None:
    """EAX above 63: #UD in L2, whatever the controls."""
    views = Views(l1)
    for function in (64, 0x100, 0x80000000, 0xFFFFFFFF):
        seen = views.guest.run(code.VMFUNC, views.regs(1, function))
        assert seen == Fault(Vector.UD, error_code=0, rip=0), hex(function)
    assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[0])


@pytest.mark.sdm("VMFUNC - Invoke VM Function")
def test_vm_functions_not_enabled(l1: L1) -> None:
    """Without "enable VM functions" VMFUNC is #UD in L2, and always in L1."""
    views = Views(l1)
    guest = views.guest
    guest.off(Proc2Ctl.ENABLE_VM_FUNCTIONS)
    assert guest.run(code.VMFUNC, views.regs(1)) == Fault(Vector.UD, error_code=0, rip=0)
    assert l1.vmfunc() == Fault(Vector.UD, error_code=0, rip=0)
    assert l1.vmfunc(cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


def test_upper_register_halves(l1: L1) -> None:
    """EAX and ECX count, not RAX and RCX."""
    views = Views(l1)
    regs = views.regs(0xAAAAAAAA00000002, 0x5555555500000000)
    seen = views.guest.run(code.VMFUNC + LOAD, regs)
    assert seen == Succeed()
    assert seen.regs["rbx"] == 3


def test_index_beyond_the_list(l1: L1) -> None:
    """ECX above 511 exits; the EPT pointer stays."""
    views = Views(l1)
    guest = views.guest
    for index in (512, 513, 0x80000000, 0xFFFFFFFF):
        seen = guest.run(code.VMFUNC + LOAD, views.regs(index))
        assert seen == guest.exit(ExitReason.VMFUNC, 3), hex(index)
    assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[0])


def test_last_entry_of_the_list(l1: L1) -> None:
    """Entry 511 is the last one that can be used."""
    views = Views(l1)
    l1.write_int(l1.sym("eptp_list") + 8 * (ENTRIES - 1), views.pointers[1])
    seen = views.guest.run(code.VMFUNC + LOAD, views.regs(ENTRIES - 1))
    assert seen == Succeed()
    assert seen.regs["rbx"] == 2


def test_bad_pointer_in_the_list(l1: L1) -> None:
    """An entry that VM entry would refuse exits and changes nothing."""
    views = Views(l1)
    guest = views.guest
    good = views.pointers[1]
    bad = [good & ~7 | 2, good & ~0x38, good & ~0x38 | 5 << 3, good | 1 << 11, good | 1 << 62, 0]
    if not l1.caps.supports(EptVpidCap.ACCESSED_DIRTY):
        bad.append(good | 1 << 6)
    for pointer in bad:
        l1.write_int(l1.sym("eptp_list") + 8, pointer)
        seen = guest.run(code.VMFUNC + LOAD, views.regs(1))
        assert seen == guest.exit(ExitReason.VMFUNC, 3), hex(pointer)
        assert l1.vmread(Field.EPT_POINTER) == Succeed(views.pointers[0])
    l1.write_int(l1.sym("eptp_list") + 8, good)
    assert guest.run(code.VMFUNC + LOAD, views.regs(1)) == Succeed()


def test_view_without_the_code(l1: L1) -> None:
    """After a switch to an empty hierarchy the next fetch is an EPT violation behind VMFUNC."""
    views = Views(l1)
    guest = views.guest
    l1.write_int(l1.sym("eptp_list") + 8, l1.alloc() | 0x1E)
    seen = guest.run(code.VMFUNC + LOAD, views.regs(1))
    # Whether the fetch or the page walk for it comes first is a matter of cached translations.
    assert seen == Exit(ExitReason.EPT_VIOLATION, rip=guest.at(3))
    guest.vmcs[Field.EPT_POINTER] = views.pointers[2]
    seen = guest.go_on()
    assert seen == Succeed()
    assert seen.regs["rbx"] == 3
