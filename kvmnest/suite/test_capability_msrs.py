"""The VMX capability MSRs as L1 reads them: consistent, read-only, the same as KVM reports."""

import pytest

from kvmnest.kvm.cpuid import table
from kvmnest.l1 import L1
from kvmnest.vmx import (
    EntryCtl,
    EptVpidCap,
    ExitCtl,
    Field,
    Msr,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.msrs import VMX_MSRS
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [
    pytest.mark.series(6),
    pytest.mark.sdm("VMX Capability Reporting Facility"),
]

TRUE = {
    Msr.IA32_VMX_PINBASED_CTLS: Msr.IA32_VMX_TRUE_PINBASED_CTLS,
    Msr.IA32_VMX_PROCBASED_CTLS: Msr.IA32_VMX_TRUE_PROCBASED_CTLS,
    Msr.IA32_VMX_EXIT_CTLS: Msr.IA32_VMX_TRUE_EXIT_CTLS,
    Msr.IA32_VMX_ENTRY_CTLS: Msr.IA32_VMX_TRUE_ENTRY_CTLS,
}
#: The bits that are reserved and 1 in processors without the TRUE MSRs.
DEFAULT1 = {
    Msr.IA32_VMX_PINBASED_CTLS: 0x16,
    Msr.IA32_VMX_PROCBASED_CTLS: 0x0401E172,
    Msr.IA32_VMX_EXIT_CTLS: 0x36DFF,
    Msr.IA32_VMX_ENTRY_CTLS: 0x11FF,
}


def _present(l1: L1) -> list[int]:
    return [msr for msr in VMX_MSRS if msr in l1.kvm.msr_feature_index_list()]


def test_l1_reads_what_kvm_reports(l1: L1) -> None:
    """RDMSR in L1 gives the values that KVM_GET_MSRS gives."""
    values = l1.vcpu.get_msrs(_present(l1))
    assert values
    for msr, value in values.items():
        assert l1.rdmsr(msr) == Succeed(value), hex(msr)


#: Bits of capability MSRs that the SDM defines.
DEFINED = {
    Msr.IA32_VMX_BASIC: (1 << 31) - 1 | 0x1FFF << 32 | 0x1FF << 48 | 1 << 58,
    Msr.IA32_VMX_MISC: (1 << 64) - 1 & ~(0x1F << 9 | 1 << 31),
    Msr.IA32_VMX_VMCS_ENUM: 0x3FE,
    Msr.IA32_VMX_EPT_VPID_CAP: sum(EptVpidCap) | 0x3F << 48,
}


@pytest.mark.parametrize("msr", DEFINED, ids=lambda msr: msr.name)
def test_reserved_bits_are_0(l1: L1, msr: Msr) -> None:
    """Bits that have no meaning are reported as 0."""
    if msr not in _present(l1):
        pytest.skip(f"no {msr.name}")
    value = l1.rdmsr(msr).value
    assert value & ~DEFINED[msr] == 0
    if msr is Msr.IA32_VMX_MISC:
        assert value >> 16 & 0x1FF <= 256  # CR3-target values
        if l1.caps.supports(Proc2Ctl.UNRESTRICTED_GUEST):
            assert value & 1 << 5  # VM exits save IA32_EFER.LMA


def test_read_only(l1: L1) -> None:
    """WRMSR to a capability MSR gives #GP(0) and changes nothing."""
    for msr in _present(l1):
        value = l1.rdmsr(msr).value
        assert l1.wrmsr(msr, value) == Fault(Vector.GP, error_code=0, rip=0), hex(msr)
        assert l1.rdmsr(msr) == Succeed(value)


@pytest.mark.parametrize("msr", TRUE, ids=lambda msr: msr.name)
def test_allowed_0_within_allowed_1(l1: L1, msr: Msr) -> None:
    """A control that must be 1 may be 1."""
    for which in (msr, TRUE[msr]):
        value = l1.rdmsr(which).value
        assert value & 0xFFFFFFFF & ~(value >> 32) == 0, hex(which)


@pytest.mark.parametrize("msr", TRUE, ids=lambda msr: msr.name)
def test_default1_controls(l1: L1, msr: Msr) -> None:
    """The plain MSR reports each default1 control as 1; the TRUE one may relax it."""
    plain, true = l1.rdmsr(msr).value, l1.rdmsr(TRUE[msr]).value
    assert plain & DEFAULT1[msr] == DEFAULT1[msr]
    assert true >> 32 == plain >> 32
    assert true & 0xFFFFFFFF & ~plain == 0
    assert (plain ^ true) & 0xFFFFFFFF & ~DEFAULT1[msr] == 0


def test_secondary_controls_may_all_be_0(l1: L1) -> None:
    """Bits 31:0 of IA32_VMX_PROCBASED_CTLS2 are 0."""
    assert l1.rdmsr(Msr.IA32_VMX_PROCBASED_CTLS2).value & 0xFFFFFFFF == 0


@pytest.mark.parametrize("register", ["CR0", "CR4"])
def test_fixed_bits_are_consistent(l1: L1, register: str) -> None:
    """A bit fixed to 1 in FIXED0 is 1 in FIXED1, too."""
    fixed0 = l1.rdmsr(Msr[f"IA32_VMX_{register}_FIXED0"]).value
    fixed1 = l1.rdmsr(Msr[f"IA32_VMX_{register}_FIXED1"]).value
    assert fixed0 & ~fixed1 == 0
    assert fixed0


def test_vmcs_enum_covers_every_field(l1: L1) -> None:
    """No field that L1 can read has a higher index than IA32_VMX_VMCS_ENUM says."""
    l1.launchable()
    highest = l1.caps.vmcs_enum_max_index
    readable = [field for field in Field if l1.vmread(field) == Succeed()]
    assert readable
    assert max(field.index for field in readable) <= highest


def test_controls_that_belong_together(l1: L1) -> None:
    """A save control comes with its load control, virtual NMIs with NMI exiting."""
    caps = l1.caps
    if caps.supports(ExitCtl.LOAD_EFER):
        assert caps.supports(EntryCtl.LOAD_EFER)
    if caps.supports(ExitCtl.LOAD_PAT):
        assert caps.supports(EntryCtl.LOAD_PAT)
    if caps.supports(PinCtl.VIRTUAL_NMIS):
        assert caps.supports(PinCtl.NMI_EXITING)
    if caps.supports(ExitCtl.SAVE_PREEMPTION_TIMER):
        assert caps.supports(PinCtl.ACTIVATE_PREEMPTION_TIMER)
    assert caps.supports(ProcCtl.HLT_EXITING)


#: Instructions that need a VM-execution control to be executed in L2: CPUID leaf, subleaf, register
#: and bit (SDM, "CPUID - CPU Identification"), and the control.
_ENABLED_BY_A_CONTROL = {
    "RDTSCP": ((0x80000001, 0, "edx", 27), Proc2Ctl.ENABLE_RDTSCP),
    "INVPCID": ((7, 0, "ebx", 10), Proc2Ctl.ENABLE_INVPCID),
    "WAITPKG": ((7, 0, "ecx", 5), Proc2Ctl.ENABLE_USER_WAIT_AND_PAUSE),
    "XSAVES": ((0xD, 1, "eax", 3), Proc2Ctl.ENABLE_XSAVES),
}


@pytest.mark.sdm("Secondary Processor-Based VM-Execution Controls")
@pytest.mark.parametrize("name", _ENABLED_BY_A_CONTROL)
def test_instructions_that_a_control_enables(l1: L1, name: str) -> None:
    """An instruction that CPUID offers to L1 can be offered to L2: its control may be 1."""
    (function, index, register, bit), control = _ENABLED_BY_A_CONTROL[name]
    registers = table(l1.vcpu.get_cpuid()).get((function, index), (0, 0, 0, 0))
    offered = dict(zip(("eax", "ebx", "ecx", "edx"), registers, strict=True))
    if not offered[register] >> bit & 1:
        pytest.skip(f"CPUID offers no {name}")
    assert l1.caps.supports(control)
