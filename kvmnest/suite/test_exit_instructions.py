"""Instructions of L2 with an intercept of their own: who gets the exit, and what it says."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kvmnest.kvm import Kvm, exits
from kvmnest.kvm.cpuid import leaf
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import (
    Cr0,
    Cr4,
    Efer,
    ExitReason,
    Field,
    Msr,
    Proc2Ctl,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Instructions That Cause VM Exits Conditionally"),
]

#: XSETBV is #UD without CR4.OSXSAVE, which a processor without XSAVE does not let one set.
_XSAVE = pytest.mark.needs(Cr4.OSXSAVE)

INVLPG = b"\x0f\x01\x3f"  # INVLPG [RDI]
INVPCID = b"\x66\x0f\x38\x82\x07"  # INVPCID RAX, [RDI]
RDRAND = b"\x48\x0f\xc7\xf0"  # RDRAND RAX
RDSEED = b"\x48\x0f\xc7\xf8"  # RDSEED RAX
GETSEC = b"\x0f\x37"
RSM = b"\x0f\xaa"
XSAVES = b"\x48\x0f\xc7\x2f"  # XSAVES64 [RDI]
XRSTORS = b"\x48\x0f\xc7\x1f"  # XRSTORS64 [RDI]
TPAUSE = b"\x66\x0f\xae\xf1"  # TPAUSE ECX
ENCLS = b"\x0f\x01\xcf"
RDPID = b"\xf3\x0f\xc7\xf8"  # RDPID RAX

ADDRESS = 0x123456789ABC


@dataclass(frozen=True)
class Case:
    """An instruction, the control that makes it exit, and what it needs to execute at all."""

    code: bytes
    control: ProcCtl | Proc2Ctl
    reason: ExitReason
    regs: dict[str, int] = field(default_factory=dict)
    qualification: int = 0
    enable: tuple[Proc2Ctl, ...] = ()
    writes: tuple[str, ...] = ()


CONDITIONAL = {
    "INVLPG": Case(
        *(INVLPG, ProcCtl.INVLPG_EXITING, ExitReason.INVLPG, {"rdi": ADDRESS}),
        qualification=ADDRESS,
    ),
    "RDTSC": Case(code.RDTSC, ProcCtl.RDTSC_EXITING, ExitReason.RDTSC, writes=("rax", "rdx")),
    "RDTSCP": Case(
        *(code.RDTSCP, ProcCtl.RDTSC_EXITING, ExitReason.RDTSCP),
        enable=(Proc2Ctl.ENABLE_RDTSCP,),
        writes=("rax", "rdx", "rcx"),
    ),
    "PAUSE": Case(code.PAUSE, ProcCtl.PAUSE_EXITING, ExitReason.PAUSE),
    "WBINVD": Case(code.WBINVD, Proc2Ctl.WBINVD_EXITING, ExitReason.WBINVD),
    "RDRAND": Case(RDRAND, Proc2Ctl.RDRAND_EXITING, ExitReason.RDRAND, writes=("rax",)),
    "RDSEED": Case(RDSEED, Proc2Ctl.RDSEED_EXITING, ExitReason.RDSEED, writes=("rax",)),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=n, marks=pytest.mark.needs(c.control, *c.enable))
     for n, c in CONDITIONAL.items()],
)  # fmt: skip
def test_conditional(l1: L1, case: Case) -> None:
    """With its control the instruction exits and has no effect, without it it executes."""
    guest = Guest(l1, case.control, *case.enable)
    seen = guest.run(case.code, case.regs)
    assert seen == guest.exit(case.reason, len(case.code), qualification=case.qualification)
    assert guest.changed(seen) == {}
    # Only after L1 skipped it L2 goes on.
    assert guest.go_on(skip=len(case.code)) == Succeed()
    guest.off(case.control)
    seen = guest.run(case.code, case.regs)
    assert seen == Succeed()
    assert guest.changed(seen, *case.writes) == {}
    # The control is looked at anew with each entry.
    guest.on(case.control)
    assert guest.run(case.code, case.regs) == guest.exit(
        case.reason, len(case.code), qualification=case.qualification
    )


@pytest.mark.parametrize(
    ("instruction", "reason", "regs"),
    [
        pytest.param(code.CPUID, ExitReason.CPUID, {"rax": 0, "rcx": 0}, id="CPUID"),
        pytest.param(code.INVD, ExitReason.INVD, {}, id="INVD"),
        pytest.param(
            *(code.XSETBV, ExitReason.XSETBV, {"rcx": 0, "rax": 1, "rdx": 0}),
            id="XSETBV",
            marks=_XSAVE,
        ),
        pytest.param(
            *(code.XSETBV, ExitReason.XSETBV, {"rcx": 7, "rax": 0, "rdx": 0}),
            id="XSETBV-bad-index",
            marks=_XSAVE,
        ),
    ],
)
@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
def test_unconditional(
    l1: L1, instruction: bytes, reason: ExitReason, regs: dict[str, int]
) -> None:
    """CPUID, INVD and XSETBV exit whatever the controls say, before any effect of theirs."""
    guest = Guest(l1)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.OSXSAVE & l1.caps.cr4_fixed1
    xcr0 = l1.vcpu.get_xcrs().xcrs[0].value
    seen = guest.run(instruction, regs, GUEST_CR4=cr4)
    assert seen == guest.exit(reason, len(instruction))
    assert guest.changed(seen) == {}
    assert l1.vcpu.get_xcrs().xcrs[0].value == xcr0


@pytest.mark.needs(ProcCtl.HLT_EXITING)
def test_hlt_exiting(l1: L1) -> None:
    """With "HLT exiting" HLT exits; the activity state that is saved is active."""
    guest = Guest(l1, ProcCtl.HLT_EXITING)
    seen = guest.run(code.HLT)
    assert seen == guest.exit(ExitReason.HLT, 1)
    assert guest.changed(seen) == {}
    assert guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (0,)
    assert guest.go_on(skip=1) == Succeed()


@pytest.mark.needs(ProcCtl.RDPMC_EXITING)
def test_rdpmc(l1: L1) -> None:
    """RDPMC exits with its control; without it a counter that does not exist is #GP(0)."""
    guest = Guest(l1, ProcCtl.RDPMC_EXITING)
    regs = {"rcx": 0x3FFFFF}
    seen = guest.run(code.RDPMC, regs)
    assert seen == guest.exit(ExitReason.RDPMC, 2)
    assert guest.changed(seen) == {}
    guest.off(ProcCtl.RDPMC_EXITING)
    assert guest.run(code.RDPMC, regs) == Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.needs(Proc2Ctl.ENABLE_RDTSCP)
def test_rdtscp_reads_tsc_aux(l1: L1) -> None:
    """RDTSCP that is enabled and not intercepted gives L1's IA32_TSC_AUX and a TSC that grows."""
    assert l1.wrmsr(Msr.TSC_AUX, 0x1234567) == Succeed()
    guest = Guest(l1, Proc2Ctl.ENABLE_RDTSCP)
    before = l1.rdtsc().value
    seen = guest.run(code.RDTSCP)
    assert seen == Succeed()
    assert seen.regs["rcx"] == 0x1234567
    tsc = seen.regs["rdx"] << 32 | seen.regs["rax"]
    assert before < tsc < l1.rdtsc().value


@pytest.mark.needs(Proc2Ctl.ENABLE_RDTSCP)
@pytest.mark.sdm("Changes to Instruction Behavior in VMX Non-Root Operation")
def test_rdpid(l1: L1) -> None:
    """RDPID is #UD without "enable RDTSCP", else it reads L1's IA32_TSC_AUX; it never exits."""
    if not l1.cpuid(7).value[2] >> 22 & 1:
        pytest.skip("needs RDPID: CPUID.07H:ECX[22] is 0")
    assert l1.wrmsr(Msr.TSC_AUX, 0x7654321) == Succeed()
    guest = Guest(l1, ProcCtl.RDTSC_EXITING)
    assert guest.run(RDPID) == Fault(Vector.UD, error_code=0, rip=0)
    assert guest.run(RDPID, EXCEPTION_BITMAP=1 << Vector.UD) == guest.exception(Vector.UD)
    guest.on(Proc2Ctl.ENABLE_RDTSCP)
    seen = guest.run(RDPID)
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 0x7654321}


@pytest.mark.sdm("Changes to Instruction Behavior in VMX Non-Root Operation")
@pytest.mark.parametrize(
    ("instruction", "controls"),
    [
        pytest.param(code.RDTSCP, (Proc2Ctl.ENABLE_RDTSCP, ProcCtl.RDTSC_EXITING), id="RDTSCP"),
        pytest.param(INVPCID, (Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING), id="INVPCID"),
        pytest.param(XSAVES, (Proc2Ctl.ENABLE_XSAVES,), id="XSAVES"),
        pytest.param(XRSTORS, (Proc2Ctl.ENABLE_XSAVES,), id="XRSTORS"),
        pytest.param(TPAUSE, (Proc2Ctl.ENABLE_USER_WAIT_AND_PAUSE,), id="TPAUSE"),
        pytest.param(code.VMFUNC, (Proc2Ctl.ENABLE_VM_FUNCTIONS,), id="VMFUNC"),
    ],
)
def test_undefined_without_enabling_control(
    l1: L1, instruction: bytes, controls: tuple[ProcCtl | Proc2Ctl, ...]
) -> None:
    """An instruction whose enabling control is 0 is #UD, and the exiting control is no matter."""
    enable, *exiting = controls
    guest = Guest(l1, *exiting)
    assert guest.run(instruction, {"rdi": l1.sym("l2_data")}) == Fault(
        Vector.UD, error_code=0, rip=0
    )
    # The exception bitmap takes it.
    seen = guest.run(instruction, EXCEPTION_BITMAP=1 << Vector.UD)
    assert seen == guest.exception(Vector.UD)
    # With "activate secondary controls" 0 the whole field is as if 0.
    if enable in Proc2Ctl and l1.caps.supports(enable):
        guest = Guest(l1, *exiting) if l1.current is None else guest
        guest.vmcs[Field.EXCEPTION_BITMAP] = 0
        guest.vmcs[Field.SECONDARY_VM_EXEC_CONTROL] = enable
        guest.off(ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
        assert guest.run(instruction) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING)
def test_invpcid_executes(l1: L1) -> None:
    """Enabled and not intercepted INVPCID executes, and checks its operand itself."""
    guest = Guest(l1, Proc2Ctl.ENABLE_INVPCID)
    l1.write(l1.sym("l2_data"), bytes(16))
    regs = {"rdi": l1.sym("l2_data"), "rax": 2}
    seen = guest.run(INVPCID, regs)
    assert seen == Succeed()
    assert guest.changed(seen) == {}
    # Type 4 does not exist.
    seen = guest.run(INVPCID, regs | {"rax": 4})
    assert seen == Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID)
@pytest.mark.sdm("INVPCID-Invalidate Process-Context Identifier")
@pytest.mark.parametrize("kind", range(4))
def test_invpcid_without_paging(l1: L1, kind: int) -> None:
    """A vCPU in protected mode executes INVPCID of each type; there is nothing to invalidate."""
    page = l1.alloc()
    l1.write(page, INVPCID + code.out8(0x80))
    sregs, regs = l1.vcpu.get_sregs(), l1.vcpu.get_regs()
    sregs.cr0 &= ~Cr0.PG
    sregs.efer &= ~(Efer.LME | Efer.LMA)
    sregs.cs.l, sregs.cs.db = 0, 1
    l1.vcpu.set_sregs(sregs)
    regs.rip, regs.rax, regs.rdi, regs.rflags = page, kind, page + 256, 2
    l1.vcpu.set_regs(regs)
    assert isinstance(l1.vcpu.run(), exits.IoExit)


@pytest.mark.needs(Proc2Ctl.PAUSE_LOOP_EXITING)
def test_pause_loop_exiting(l1: L1) -> None:
    """A loop of PAUSEs within the gap and longer than the window exits as PAUSE does."""
    guest = Guest(l1, Proc2Ctl.PAUSE_LOOP_EXITING)
    loop = code.PAUSE + b"\xeb\xfc"
    seen = guest.run(loop, PLE_GAP=0x10000, PLE_WINDOW=0x100)
    assert seen == guest.exit(ExitReason.PAUSE, 2)


@pytest.mark.needs(Proc2Ctl.ENABLE_XSAVES)
def test_xsaves_exiting(l1: L1) -> None:
    """XSAVES exits when EDX:EAX, IA32_XSS and the XSS-exiting bitmap have a bit in common."""
    guest = Guest(l1, Proc2Ctl.ENABLE_XSAVES)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.OSXSAVE
    regs = {"rdi": l1.sym("l2_data"), "rax": 0x100, "rdx": 0}
    assert guest.run(XSAVES, regs, GUEST_CR4=cr4, XSS_EXIT_BITMAP=0x100) == Succeed()


@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
@pytest.mark.parametrize(
    "instruction", [pytest.param(GETSEC, id="GETSEC"), pytest.param(RSM, id="RSM")]
)
def test_undefined_whatever_the_controls(l1: L1, instruction: bytes) -> None:
    """GETSEC with CR4.SMXE 0 and RSM outside SMM are #UD, which comes before a VM exit."""
    guest = Guest(l1)
    assert guest.run(instruction) == Fault(Vector.UD, error_code=0, rip=0)
    assert guest.run(instruction, EXCEPTION_BITMAP=1 << Vector.UD) == guest.exception(Vector.UD)


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_fault_comes_before_the_exit(l1: L1) -> None:
    """#UD and the privilege check come before the VM exit of an intercepted instruction."""
    guest = Guest(l1, ProcCtl.HLT_EXITING, ProcCtl.RDTSC_EXITING, ProcCtl.RDPMC_EXITING)
    guest.on(Proc2Ctl.WBINVD_EXITING)
    cr4 = guest.vmcs[Field.GUEST_CR4]
    general, undefined = Fault(Vector.GP, error_code=0, rip=0), Fault(Vector.UD, rip=0)
    guest.set_cpl(3)
    privileged = {
        **{"HLT": code.HLT, "INVD": code.INVD, "WBINVD": code.WBINVD, "RDPMC": code.RDPMC},
        **{"RDMSR": code.RDMSR, "WRMSR": code.WRMSR},
        "MOV CR0": code.mov_from_cr(0),
        "MOV to CR3": code.mov_to_cr(3),
    }
    for name, instruction in privileged.items():
        assert guest.run(instruction) == general, name
    assert guest.run(code.RDTSC, GUEST_CR4=cr4 | Cr4.TSD) == general
    assert guest.run(code.RDTSC, GUEST_CR4=cr4) == guest.exit(ExitReason.RDTSC, 2)
    # CPUID has no privilege check.
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)
    guest.set_cpl(0)
    assert guest.run(b"\xf0" + code.RDTSC) == undefined  # LOCK RDTSC
    assert guest.run(code.XSETBV, GUEST_CR4=cr4 & ~Cr4.OSXSAVE) == undefined
    # With all exceptions intercepted, the exception is what L1 sees.
    seen = guest.run(code.XSETBV, EXCEPTION_BITMAP=0xFFFFFFFF)
    assert seen == guest.exception(Vector.UD)


@_XSAVE
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_xsetbv_at_cpl_3(l1: L1) -> None:
    """The privilege check of XSETBV comes before its VM exit."""
    guest = Guest(l1)
    guest.set_cpl(3)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.OSXSAVE
    seen = guest.run(code.XSETBV, {"rcx": 0}, GUEST_CR4=cr4)
    assert seen == Fault(Vector.GP, error_code=0, rip=0)


@pytest.fixture
def monitor_l1(kvm: Kvm, pytestconfig: pytest.Config) -> Iterator[L1]:
    """An L1 whose CPUID has MONITOR/MWAIT, which KVM does not offer by itself."""
    cpuid = kvm.supported_cpuid()
    leaf(cpuid, 1).ecx |= 1 << 3
    with L1(kvm, budget=pytestconfig.getoption("--kvmnest-budget")) as new:
        new.vcpu.set_cpuid(cpuid)
        yield new


@pytest.mark.parametrize(
    ("instruction", "control", "reason", "undefined"),
    [
        pytest.param(code.MONITOR, ProcCtl.MONITOR_EXITING, ExitReason.MONITOR, 0, id="MONITOR"),
        # Bit 0 of MWAIT's qualification tells whether the address-range monitor is armed.
        pytest.param(code.MWAIT, ProcCtl.MWAIT_EXITING, ExitReason.MWAIT, 1, id="MWAIT"),
    ],
)
def test_monitor_and_mwait(
    monitor_l1: L1, instruction: bytes, control: ProcCtl, reason: ExitReason, undefined: int
) -> None:
    """MONITOR and MWAIT exit by their controls, and else complete; at CPL 3 they are #UD."""
    guest = Guest(monitor_l1, control)
    regs = {"rax": monitor_l1.sym("l2_data"), "rcx": 0, "rdx": 0}
    seen = guest.run(instruction, regs)
    assert seen == guest.exit(reason, 3, qualification=Masked(0, ~undefined))
    assert guest.changed(seen) == {}
    guest.off(control)
    seen = guest.run(instruction, regs)
    assert seen == Succeed()
    assert guest.changed(seen) == {}
    guest.on(control)
    guest.set_cpl(3)
    assert guest.run(instruction, regs) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.needs(ProcCtl.INVLPG_EXITING)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_invlpg_at_cpl_3(l1: L1) -> None:
    """The privilege check of INVLPG comes before its VM exit."""
    guest = Guest(l1, ProcCtl.INVLPG_EXITING)
    guest.set_cpl(3)
    assert guest.run(INVLPG) == Fault(Vector.GP, error_code=0, rip=0)


def test_prefixes_count_for_the_length(l1: L1) -> None:
    """The instruction length includes every prefix."""
    guest = Guest(l1)
    for prefixes in (b"\x66", b"\x48", b"\x2e\x66\x67", b"\x66" * 13):
        seen = guest.run(prefixes + code.CPUID, {"rax": 0})
        assert seen == guest.exit(ExitReason.CPUID, 2 + len(prefixes)), prefixes.hex()
    assert guest.run(b"\x66" * 14 + code.CPUID) == Fault(Vector.GP, error_code=0, rip=0)


def test_intercept_inside_interrupt_shadow(l1: L1) -> None:
    """An exit right behind STI or MOV SS saves the blocking that was in force."""
    guest = Guest(l1)
    seen = guest.run(code.STI + code.CPUID)
    assert seen == guest.exit(ExitReason.CPUID, 2, offset=1)
    assert guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO) == (1,)
    seen = guest.run(b"\x8e\xd0" + code.CPUID, {"rax": l1.sym("SEL_DATA")})  # MOV SS, EAX
    assert seen == guest.exit(ExitReason.CPUID, 2, offset=2)
    assert guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO) == (2,)
    seen = guest.run(code.STI + code.NOP + code.CPUID)
    assert seen == guest.exit(ExitReason.CPUID, 2, offset=2)
    assert guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO) == (0,)
