"""VMLAUNCH and VMRESUME: launch state, permission checks, entry to L2 and the way back."""

from typing import Any

import pytest

from kvmnest.l1 import L1, L2Mode, Shadow
from kvmnest.vmx import Cr0, Cr4, ExitReason, Field, Proc2Ctl, ProcCtl, Rflags, Vector, VmxError
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed, VMfailInvalid, VMfailValid

pytestmark = [pytest.mark.series(16), pytest.mark.sdm("VMLAUNCH/VMRESUME")]

ENTRIES = ("vmlaunch", "vmresume")
GUEST_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)


def _enter(l1: L1, name: str, **how: Any) -> Outcome:
    return l1.vmlaunch(**how) if name == "vmlaunch" else l1.vmresume(**how)


@pytest.fixture
def launched(l1: L1) -> L1:
    """L1 whose current VMCS was launched once."""
    l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    return l1


# --- launch state ---


def test_vmlaunch_enters_l2_and_vmcall_exits(l1: L1) -> None:
    """The whole way: VMXON, VMCLEAR, VMPTRLD, VMLAUNCH, VMCALL in L2, exit to L1."""
    vmcs = l1.launchable()
    rip = vmcs[Field.GUEST_RIP]
    assert l1.vmlaunch() == Exit(
        ExitReason.VMCALL, qualification=0, rip=rip, length=3, intr_info=0, idt_info=0
    )


def test_vmlaunch_of_launched_vmcs(launched: L1) -> None:
    """A launched VMCS must be entered by VMRESUME: error 4."""
    assert launched.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
    # It stays launched.
    assert launched.vmresume() == Exit(ExitReason.VMCALL)


def test_vmresume_of_clear_vmcs(l1: L1) -> None:
    """A clear VMCS must be entered by VMLAUNCH: error 5."""
    l1.launchable()
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    # It stays clear.
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


def test_vmclear_makes_a_launched_vmcs_clear(launched: L1) -> None:
    """VMCLEAR sets the launch state to clear; the content is kept."""
    address = launched.vmcs.address
    assert launched.vmclear(address) == Succeed()
    assert launched.vmptrld(address) == Succeed()
    assert launched.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert launched.vmlaunch() == Exit(ExitReason.VMCALL)


def test_vmptrld_keeps_the_launch_state(launched: L1) -> None:
    """VMPTRLD of the current VMCS changes nothing in its launch state."""
    assert launched.vmptrld(launched.vmcs.address) == Succeed()
    assert launched.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
    assert launched.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        (Field.CPU_BASED_VM_EXEC_CONTROL, 0, VmxError.ENTRY_INVALID_CONTROL_FIELD),
        (Field.HOST_CR0, 0, VmxError.ENTRY_INVALID_HOST_STATE_FIELD),
    ],
    ids=["control-field", "host-state-field"],
)
def test_failed_vmlaunch_leaves_the_vmcs_clear(
    l1: L1, field: Field, value: int, error: VmxError
) -> None:
    """A VMLAUNCH that fails with error 7 or 8 does not launch."""
    vmcs = l1.launchable()
    good = vmcs[field]
    vmcs[field] = value
    assert l1.vmlaunch() == VMfailValid(error)
    vmcs[field] = good
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


# --- permission and current VMCS ---


@pytest.mark.parametrize("name", ENTRIES)
def test_without_current_vmcs(l1: L1, name: str) -> None:
    """No current VMCS: VMfailInvalid, since there is no field for an error number."""
    l1.enter_vmx()
    assert _enter(l1, name) == VMfailInvalid()


@pytest.mark.parametrize("name", ENTRIES)
def test_outside_vmx_operation(l1: L1, name: str) -> None:
    """Outside VMX operation: #UD."""
    assert _enter(l1, name) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize("name", ENTRIES)
def test_after_vmxoff(launched: L1, name: str) -> None:
    """VMXOFF leaves VMX operation: #UD again."""
    assert launched.vmxoff() == Succeed()
    assert _enter(launched, name) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize("name", ENTRIES)
def test_at_cpl_3(launched: L1, name: str) -> None:
    """CPL above 0: #GP(0), and nothing changes."""
    assert _enter(launched, name, cpl=3) == Fault(Vector.GP, error_code=0, rip=0)
    assert launched.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize("name", ENTRIES)
def test_at_cpl_3_outside_vmx_operation(l1: L1, name: str) -> None:
    """#UD comes before the privilege check."""
    assert _enter(l1, name, cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


# --- MOV-SS blocking, the check that the patch's reviewer asked for ---


@pytest.mark.parametrize("name", ENTRIES)
def test_mov_ss_blocking(l1: L1, name: str) -> None:
    """Blocking by MOV SS: error 26, before the launch state is looked at."""
    l1.launchable()
    blocked = VMfailValid(VmxError.ENTRY_EVENTS_BLOCKED_BY_MOV_SS)
    assert _enter(l1, name, shadow=Shadow.MOV_SS) == blocked
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert _enter(l1, name, shadow=Shadow.MOV_SS) == blocked
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


def test_sti_blocking_does_not_matter(l1: L1) -> None:
    """Blocking by STI is no reason to refuse an entry."""
    l1.launchable()
    assert l1.vmlaunch(shadow=Shadow.STI, rflags=0x2) == Exit(ExitReason.VMCALL)
    assert l1.vmresume(shadow=Shadow.STI, rflags=0x2) == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize("name", ENTRIES)
def test_no_current_vmcs_comes_before_mov_ss(l1: L1, name: str) -> None:
    """VMfailInvalid wins over blocking by MOV SS."""
    l1.enter_vmx()
    assert _enter(l1, name, shadow=Shadow.MOV_SS) == VMfailInvalid()


def test_cpl_comes_before_no_current_vmcs(l1: L1) -> None:
    """#GP(0) wins over VMfailInvalid."""
    l1.enter_vmx()
    assert l1.vmlaunch(cpl=3) == Fault(Vector.GP, error_code=0, rip=0)


# --- entry and exit ---


def test_registers_both_ways(l1: L1) -> None:
    """Each general register reaches L2 and comes back; VMX switches none but RSP."""
    l1.launchable(l2="l2_registers")
    before = {name: 0x1111111111111111 * (i + 1) for i, name in enumerate(GUEST_REGISTERS)}
    seen = l1.vmlaunch(regs=before)
    assert seen == Exit(ExitReason.VMCALL)
    mask = (1 << 64) - 1
    expected = {name: ~value & mask for name, value in before.items()}
    expected["rax"] = before["rax"] + 1
    assert {name: seen.regs[name] for name in GUEST_REGISTERS} == expected


def test_cr2_both_ways(l1: L1) -> None:
    """CR2 is not part of the VMCS: L2 sees L1's, L1 sees what L2 left."""
    from kvmnest.l1 import code

    read_change = code.mov_from_cr(2, "rbx") + code.mov("rax", 0x5678) + code.mov_to_cr(2, "rax")
    l1.launchable(l2=read_change)
    seen = l1.vmlaunch(regs={"cr2": 0x1234})
    assert seen == Exit(ExitReason.VMCALL)
    assert (seen.regs["rbx"], seen.cr2) == (0x1234, 0x5678)


def test_vmresume_many_times(l1: L1) -> None:
    """A hundred entries behave like one."""
    vmcs = l1.launchable(l2="l2_registers")
    start = vmcs[Field.GUEST_RIP]
    seen = l1.vmlaunch(regs={"rax": 0})
    assert seen == Exit(ExitReason.VMCALL)
    rip = seen.rip
    for count in range(1, 101):
        vmcs[Field.GUEST_RIP] = start
        seen = l1.vmresume(regs={"rax": count})
        assert seen == Exit(ExitReason.VMCALL, rip=rip)
        assert seen.regs["rax"] == count + 1


def test_two_vmcss_alternate(l1: L1) -> None:
    """Two VMCSs keep their own launch state and guest state."""
    first = l1.launchable(l2="l2_vmcall")
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL, rip=l1.sym("l2_vmcall"))
    second = l1.load_vmcs("vmcs_b", l2="l2_registers")
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    seen = l1.vmlaunch(regs={"rax": 1})
    assert seen == Exit(ExitReason.VMCALL)
    rip_second = seen.rip
    for _ in range(5):
        assert l1.vmptrld(first.address) == Succeed()
        assert l1.vmresume() == Exit(ExitReason.VMCALL, rip=l1.sym("l2_vmcall"))
        assert l1.vmptrld(second.address) == Succeed()
        second[Field.GUEST_RIP] = l1.sym("l2_registers")
        assert l1.vmresume() == Exit(ExitReason.VMCALL, rip=rip_second)


def test_l2_rflags_and_rsp_come_from_the_vmcs(l1: L1) -> None:
    """RSP and RFLAGS are loaded from the guest-state area and saved to it."""
    from kvmnest.l1 import code

    vmcs = l1.launchable(l2=code.PUSHFQ + b"\x5b")  # PUSHFQ; POP RBX
    flags = 0x2 | Rflags.CF | Rflags.ZF | Rflags.OF
    vmcs[Field.GUEST_RFLAGS] = flags
    seen = l1.vmlaunch()
    assert seen == Exit(ExitReason.VMCALL)
    assert seen.regs["rbx"] == flags
    assert vmcs.read(Field.GUEST_RFLAGS, Field.GUEST_RSP) == (flags, l1.sym("l2_stack_top"))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(L2Mode.LONG, id="64-bit"),
        pytest.param(L2Mode.PROTECTED, id="32-bit"),
        pytest.param(L2Mode.PAE, id="pae"),
        pytest.param(
            L2Mode.UNPAGED, id="unpaged", marks=pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
        ),
        pytest.param(L2Mode.REAL, id="real", marks=pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)),
    ],
)
def test_l2_modes(l1: L1, mode: L2Mode) -> None:
    """L2 runs in each processor mode and exits by VMCALL."""
    vmcs = l1.launchable(mode=mode)
    rip = vmcs[Field.GUEST_RIP]
    assert l1.vmlaunch(regs={"rax": 0x89ABCDEF}) == Exit(ExitReason.VMCALL, rip=rip, length=3)
    assert l1.vmresume() == Exit(ExitReason.VMCALL, rip=rip, length=3)


@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED, L2Mode.PAE], ids=lambda m: m.name)
def test_l2_without_ept(l1: L1, mode: L2Mode) -> None:
    """Without EPT, L2's CR3 walks L1's memory directly."""
    vmcs = l1.launchable(mode=mode, ept=False)
    rip = vmcs[Field.GUEST_RIP]
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL, rip=rip, length=3)
    assert l1.vmresume() == Exit(ExitReason.VMCALL, rip=rip, length=3)


def test_exit_leaves_l1_in_its_own_state(launched: L1) -> None:
    """After the exit CR0, CR3, CR4 and EFER are the host-state area's."""
    vmcs = launched.vmcs
    cr0, cr3, cr4 = vmcs.read(Field.HOST_CR0, Field.HOST_CR3, Field.HOST_CR4)
    assert launched.read_cr(0) == Succeed(cr0)
    assert launched.read_cr(3) == Succeed(cr3)
    assert launched.read_cr(4) == Succeed(cr4)
    assert cr4 & Cr4.VMXE


# --- a failure that KVM leaves to the processor ---


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
@pytest.mark.parametrize(
    "bit",
    [Cr0.TS, Cr0.WP, Cr0.AM, Cr4.TSD, Cr4.DE, Cr4.PCE, Cr4.VME],
    ids=lambda bit: f"{type(bit).__name__.upper()}-{bit.name}",
)
def test_late_vmfail_leaves_control_registers(l1: L1, bit: Cr0 | Cr4) -> None:
    """An entry that fails by its controls leaves CR0 and CR4, as L1 has just written them."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = 1  # above the TPR in the page
    number = 0 if isinstance(bit, Cr0) else 4
    before = l1.read_cr(number)
    assert isinstance(before, Succeed)
    assert l1.write_cr(number, before.value ^ bit) == Succeed()
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
    assert l1.read_cr(number) == Succeed(before.value ^ bit)
