"""The host restricts the VMX capability MSRs by KVM_SET_MSRS: what it may do, and its effect."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import pytest

from kvmnest.kvm import Kvm, KvmMsrError, Vcpu
from kvmnest.l1 import L1
from kvmnest.suite.support.entries import BAD_CONTROL, BAD_GUEST, Entries
from kvmnest.vmx import (
    ActivityState,
    BasicCap,
    Cr0,
    EntryCtl,
    EptVpidCap,
    ExitCtl,
    ExitReason,
    Field,
    Kind,
    Misc,
    Msr,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Vector,
    VmFunc,
    VmxError,
    Width,
)
from kvmnest.vmx.capinfo import BasicInfo, MiscInfo
from kvmnest.vmx.outcome import Exit, Fault, Succeed, VMfailInvalid, VMfailValid
from kvmnest.vmx.registers import PAT_RESET

pytestmark = [
    pytest.mark.series(6),
    pytest.mark.sdm("VMX Capability Reporting Facility"),
]

#: The MSR that the host writes for each kind of controls.
CONTROLS: dict[type[enum.IntFlag], Msr] = {
    PinCtl: Msr.IA32_VMX_TRUE_PINBASED_CTLS,
    ProcCtl: Msr.IA32_VMX_TRUE_PROCBASED_CTLS,
    Proc2Ctl: Msr.IA32_VMX_PROCBASED_CTLS2,
    ExitCtl: Msr.IA32_VMX_TRUE_EXIT_CTLS,
    EntryCtl: Msr.IA32_VMX_TRUE_ENTRY_CTLS,
}
GENERATED = (
    *(Msr.IA32_VMX_PINBASED_CTLS, Msr.IA32_VMX_PROCBASED_CTLS),
    *(Msr.IA32_VMX_EXIT_CTLS, Msr.IA32_VMX_ENTRY_CTLS),
    *(Msr.IA32_VMX_CR0_FIXED1, Msr.IA32_VMX_CR4_FIXED1),
)
ALL = (*CONTROLS.values(), Msr.IA32_VMX_BASIC, Msr.IA32_VMX_MISC, Msr.IA32_VMX_EPT_VPID_CAP)
LOW = 0xFFFFFFFF


def _get(l1: L1, msr: Msr) -> int:
    return l1.vcpu.get_msrs([msr])[msr]


@pytest.fixture
def unstarted(kvm: Kvm) -> Iterator[Vcpu]:
    """A vCPU that has never run: after the first KVM_RUN newer kernels refuse every change."""
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        yield vcpu


def check_taken(vcpu: Vcpu, msr: Msr, value: int, why: object = "") -> None:
    """Assert that KVM_SET_MSRS takes a value, and put the old one back."""
    before = vcpu.get_msrs([msr])[msr]
    assert vcpu.set_msrs({msr: value}) == 1, why
    assert vcpu.get_msrs([msr])[msr] == value, why
    assert vcpu.set_msrs({msr: before}) == 1, why


def check_refused(vcpu: Vcpu, msr: Msr, value: int, why: str) -> None:
    """Assert that KVM_SET_MSRS refuses a value and that the MSR stays."""
    before = vcpu.get_msrs([msr])[msr]
    try:
        vcpu.set_msrs({msr: value})
    except KvmMsrError:
        taken = False
    else:
        taken = True
    assert not taken, f"{msr.name} took {value:#x}: {why}"
    assert vcpu.get_msrs([msr])[msr] == before, why


# --- what KVM_SET_MSRS takes ---


def test_fewer_controls(unstarted: Vcpu) -> None:
    """May-be-1 bits can be taken away and given back; the plain MSR shows it."""
    for kind, msr in CONTROLS.items():
        full = unstarted.get_msrs([msr])[msr]
        optional = full >> 32 & ~full & LOW
        assert optional
        for bit in (n for n in range(32) if optional >> n & 1):
            value = full & ~(1 << 32 + bit)
            check_taken(unstarted, msr, value, bit)
            if kind is not Proc2Ctl:
                unstarted.set_msrs({msr: value})
                plain = Msr[msr.name.replace("TRUE_", "")]
                assert unstarted.get_msrs([plain])[plain] >> 32 == value >> 32, bit
                unstarted.set_msrs({msr: full})


def test_l1_reads_what_the_host_set(l1: L1) -> None:
    """RDMSR gives L1 the restricted value of each capability MSR, of the plain ones too."""
    for kind, msr in CONTROLS.items():
        full = _get(l1, msr)
        optional = full >> 32 & ~full & LOW
        value = full & ~((optional & -optional) << 32)
        l1.set_feature_msrs({msr: value})
        assert l1.rdmsr(msr) == Succeed(value)
        if kind is not Proc2Ctl:
            plain = l1.rdmsr(Msr[msr.name.replace("TRUE_", "")]).value
            assert plain >> 32 == value >> 32, msr.name
    values = {
        Msr.IA32_VMX_EPT_VPID_CAP: _get(l1, Msr.IA32_VMX_EPT_VPID_CAP) & ~EptVpidCap.INVVPID,
        Msr.IA32_VMX_BASIC: _get(l1, Msr.IA32_VMX_BASIC) & ~BasicCap.INS_OUTS_INFO,
        Msr.IA32_VMX_MISC: _get(l1, Msr.IA32_VMX_MISC) & ~Misc.ACTIVITY_HLT,
        Msr.IA32_VMX_VMFUNC: 0,
        Msr.IA32_VMX_CR0_FIXED0: _get(l1, Msr.IA32_VMX_CR0_FIXED0) | 1 << 3,
        Msr.IA32_VMX_CR4_FIXED0: _get(l1, Msr.IA32_VMX_CR4_FIXED0) | 1 << 3,
    }
    l1.set_feature_msrs(values)
    for msr, value in values.items():
        assert l1.rdmsr(msr) == Succeed(value), msr.name


def test_controls_that_do_not_exist(kvm: Kvm, unstarted: Vcpu) -> None:
    """A control that KVM does not offer to any guest cannot be added."""
    for msr in CONTROLS.values():
        full = unstarted.get_msrs([msr])[msr]
        offered = kvm.feature_msrs([msr])[msr]
        for bit in (n for n in range(32) if not offered >> 32 + n & 1):
            check_refused(unstarted, msr, full | 1 << 32 + bit, f"bit {bit} may be 1")


def test_must_be_one(unstarted: Vcpu) -> None:
    """A must-be-1 bit cannot be dropped; a control can be made one of them."""
    for msr in CONTROLS.values():
        full = unstarted.get_msrs([msr])[msr]
        for bit in (n for n in range(32) if full >> n & 1):
            check_refused(unstarted, msr, full & ~(1 << bit), f"bit {bit} must be 1")
        optional = full >> 32 & ~full & LOW
        check_taken(unstarted, msr, full | optional & -optional)


def test_generated_msrs(unstarted: Vcpu) -> None:
    """The plain control MSRs and CR0/CR4 FIXED1 follow from others: they cannot be set."""
    for msr in GENERATED:
        value = unstarted.get_msrs([msr])[msr]
        check_refused(unstarted, msr, value, "the same value")
        check_refused(unstarted, msr, 0, "0")


def test_ept_vpid_cap(unstarted: Vcpu) -> None:
    """Bits of IA32_VMX_EPT_VPID_CAP can be cleared one by one, none can be added."""
    msr = Msr.IA32_VMX_EPT_VPID_CAP
    full = unstarted.get_msrs([msr])[msr]
    for bit in range(64):
        if full >> bit & 1:
            check_taken(unstarted, msr, full & ~(1 << bit), bit)
        else:
            check_refused(unstarted, msr, full | 1 << bit, f"bit {bit}")


def test_basic(unstarted: Vcpu) -> None:
    """IA32_VMX_BASIC keeps the revision identifier; features go, the region may grow."""
    msr = Msr.IA32_VMX_BASIC
    full = unstarted.get_msrs([msr])[msr]
    for bit in range(31):
        check_refused(unstarted, msr, full ^ 1 << bit, f"revision identifier, bit {bit}")
    check_refused(unstarted, msr, full | 1 << 31, "bit 31")
    check_refused(unstarted, msr, full | BasicCap.PHYSICAL_32BIT, "32-bit addresses")
    for flag in (BasicCap.DUAL_MONITOR, BasicCap.INS_OUTS_INFO, BasicCap.TRUE_CONTROLS):
        if full & flag:
            check_taken(unstarted, msr, full & ~flag, flag.name)
        else:
            check_refused(unstarted, msr, full | flag, flag.name or "")
    size = BasicInfo(full).region_size
    check_refused(unstarted, msr, full & ~(0x1FFF << 32) | (size - 1) << 32, "a smaller region")


def test_misc(unstarted: Vcpu) -> None:
    """IA32_VMX_MISC: features can go, none can come, counts can only shrink."""
    msr = Msr.IA32_VMX_MISC
    full = unstarted.get_msrs([msr])[msr]
    for flag in Misc:
        if full & flag:
            check_taken(unstarted, msr, full & ~flag, flag.name)
        else:
            check_refused(unstarted, msr, full | flag, flag.name or "")
    for bit in (9, 10, 11, 12, 13, 31):
        check_refused(unstarted, msr, full | 1 << bit, f"reserved bit {bit}")
    targets = MiscInfo(full).cr3_targets
    check_refused(unstarted, msr, full + ((targets + 1) << 16), "more CR3 targets")
    check_refused(unstarted, msr, full ^ 1 << 32, "MSEG revision identifier")
    pin = Msr.IA32_VMX_TRUE_PINBASED_CTLS
    if unstarted.get_msrs([pin])[pin] >> 32 & PinCtl.ACTIVATE_PREEMPTION_TIMER:
        check_refused(unstarted, msr, full ^ 1, "another rate of the preemption timer")


def test_vmfunc(unstarted: Vcpu) -> None:
    """IA32_VMX_VMFUNC: functions can go, none can come."""
    msr = Msr.IA32_VMX_VMFUNC
    full = unstarted.get_msrs([msr])[msr]
    for bit in (n for n in range(64) if not full >> n & 1):
        check_refused(unstarted, msr, full | 1 << bit, f"function {bit}")
    check_taken(unstarted, msr, 0)


@pytest.mark.parametrize("register", ["CR0", "CR4"])
def test_fixed_to_one(unstarted: Vcpu, register: str) -> None:
    """Bits fixed to 1 stay fixed; FIXED0 can have more of them."""
    msr = Msr[f"IA32_VMX_{register}_FIXED0"]
    full = unstarted.get_msrs([msr])[msr]
    for bit in (n for n in range(64) if full >> n & 1):
        check_refused(unstarted, msr, full & ~(1 << bit), f"bit {bit}")
    check_taken(unstarted, msr, full | 1 << 3)


def test_not_in_vmx_operation(l1: L1) -> None:
    """In VMX operation no capability MSR can be set, not even to its own value."""
    values = {int(msr): _get(l1, msr) for msr in ALL}
    assert l1.vcpu.set_msrs(values) == len(values)
    l1.enter_vmx()
    for msr, value in values.items():
        check_refused(l1.vcpu, Msr(msr), value, "in VMX operation")
    assert l1.vmxoff() == Succeed()
    assert l1.vcpu.set_msrs(values) == len(values)


# --- what L1 is allowed then ---


TAKEN = (
    *(PinCtl.NMI_EXITING, ProcCtl.HLT_EXITING, ProcCtl.USE_TSC_OFFSETTING),
    *(ProcCtl.MOV_DR_EXITING, ProcCtl.UNCONDITIONAL_IO_EXITING, Proc2Ctl.WBINVD_EXITING),
    *(Proc2Ctl.DESCRIPTOR_TABLE_EXITING, ExitCtl.SAVE_PAT, ExitCtl.SAVE_EFER),
    EntryCtl.LOAD_PAT,
)


@pytest.mark.sdm("VM-Execution Control Fields")
def test_control_taken_away(l1: L1) -> None:
    """A control that the MSR no longer allows makes VM entry fail: error 7."""
    flags = [flag for flag in TAKEN if l1.caps.supports(flag)]
    assert flags
    for flag in flags:
        msr = CONTROLS[type(flag)]
        full = _get(l1, msr)
        l1.set_feature_msrs({msr: full & ~(int(flag) << 32)})
        assert not l1.caps.supports(flag)
        l1.launchable()
        tries = Entries(l1)
        pat = {Field.GUEST_IA32_PAT: PAT_RESET}
        assert tries({**pat, **tries.using(flag)}) == BAD_CONTROL, flag
        assert tries({}) == tries.vmcall(), flag
        assert l1.vmxoff() == Succeed()
        l1.set_feature_msrs({msr: full})


@pytest.mark.sdm("VM-Execution Control Fields")
def test_control_made_mandatory(l1: L1) -> None:
    """A control that the MSR says must be 1 makes VM entry without it fail: error 7."""
    optional = (
        *(PinCtl.NMI_EXITING, ProcCtl.MOV_DR_EXITING),
        *(Proc2Ctl.WBINVD_EXITING, ExitCtl.SAVE_PAT),
    )
    flags = [flag for flag in optional if l1.caps.supports(flag)]
    assert flags
    for flag in flags:
        msr = CONTROLS[type(flag)]
        full = _get(l1, msr)
        l1.set_feature_msrs({msr: full | int(flag)})
        l1.launchable()
        tries = Entries(l1)
        # Secondary controls count only when they are activated.
        good = tries.using(flag)
        assert tries(good) == tries.vmcall(), flag
        assert tries({**good, **tries.using(without=flag)}) == BAD_CONTROL, flag
        assert tries(good) == tries.vmcall(), flag
        assert l1.vmxoff() == Succeed()
        l1.set_feature_msrs({msr: full})


@pytest.mark.sdm("VMWRITE - Write Field to Virtual-Machine Control Structure")
def test_without_vmwrite_any_field(l1: L1) -> None:
    """IA32_VMX_MISC[29] 0: exit information is read-only; a field that does not exist comes first.

    An unsupported encoding is error 12, also when its kind is the read-only one.
    """
    full = _get(l1, Msr.IA32_VMX_MISC)
    l1.set_feature_msrs({Msr.IA32_VMX_MISC: full & ~Misc.VMWRITE_ANY_FIELD})
    l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    fields = [f for f in Field if f.kind is Kind.EXIT_INFO and l1.caps.field_exists(f)]
    for field in fields:
        seen = l1.vmread(field)
        if seen != Succeed():
            continue
        for memory in (False, True):
            refused = VMfailValid(VmxError.VMWRITE_READ_ONLY_COMPONENT)
            assert l1.vmwrite(field, 0x5A, memory=memory) == refused, field.name
        if field is not Field.VM_INSTRUCTION_ERROR:
            assert l1.vmread(field) == Succeed(seen.value), field.name
    for width in Width:
        encoding = Field.encode(width, Kind.EXIT_INFO, 0x1FF)
        refused = VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)
        assert l1.vmwrite(encoding, 0) == refused, hex(encoding)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMXON - Enter VMX Operation")
def test_more_fixed_bits(l1: L1) -> None:
    """A CR0 bit that the host fixes to 1 is needed by VMXON and cannot be cleared after it."""
    msr = Msr.IA32_VMX_CR0_FIXED0
    l1.set_feature_msrs({msr: _get(l1, msr) | Cr0.AM})
    cr0 = l1.read_cr(0).value
    assert not cr0 & Cr0.AM
    protection = Fault(Vector.GP, error_code=0, rip=0)
    assert l1.vmxon() == protection
    assert l1.write_cr(0, cr0 | Cr0.AM) == Succeed()
    assert l1.vmxon() == Succeed()
    assert l1.write_cr(0, cr0) == protection


@pytest.mark.needs(Misc.ACTIVITY_HLT)
@pytest.mark.sdm("Checks on Guest Non-Register State")
def test_activity_state_taken_away(l1: L1) -> None:
    """An activity state that IA32_VMX_MISC no longer reports is refused."""
    msr = Msr.IA32_VMX_MISC
    l1.set_feature_msrs({msr: _get(l1, msr) & ~Misc.ACTIVITY_HLT})
    l1.launchable()
    tries = Entries(l1)
    # Should L2 be entered all the same, the interrupt window ends the HLT state at once.
    window = {**tries.using(ProcCtl.INTERRUPT_WINDOW_EXITING), Field.GUEST_RFLAGS: 0x202}
    assert tries({**window, Field.GUEST_ACTIVITY_STATE: ActivityState.HLT}) == BAD_GUEST
    assert tries({}) == tries.vmcall()


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.ACCESSED_DIRTY)
@pytest.mark.sdm("Extended-Page-Table Pointer (EPTP)")
def test_accessed_dirty_taken_away(l1: L1) -> None:
    """Without the capability bit 6 of the EPTP is reserved: error 7."""
    msr = Msr.IA32_VMX_EPT_VPID_CAP
    l1.set_feature_msrs({msr: _get(l1, msr) & ~EptVpidCap.ACCESSED_DIRTY})
    vmcs = l1.launchable(ept=True)
    tries = Entries(l1)
    assert tries({Field.EPT_POINTER: vmcs[Field.EPT_POINTER] | 1 << 6}) == BAD_CONTROL
    assert tries({}) == tries.vmcall()


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.ENABLE_VM_FUNCTIONS, VmFunc.EPTP_SWITCHING)
@pytest.mark.sdm("VM-Function Controls")
def test_vm_function_taken_away(l1: L1) -> None:
    """A VM function that IA32_VMX_VMFUNC no longer reports cannot be enabled: error 7."""
    l1.set_feature_msrs({Msr.IA32_VMX_VMFUNC: 0})
    l1.launchable(ept=True)
    tries = Entries(l1)
    enabled = tries.using(Proc2Ctl.ENABLE_VM_FUNCTIONS)
    assert tries({**enabled, Field.VM_FUNCTION_CONTROL: 1}) == BAD_CONTROL
    assert tries({**enabled, Field.VM_FUNCTION_CONTROL: 0}) == tries.vmcall()


@pytest.mark.sdm("Basic VMX Information")
def test_larger_region(l1: L1) -> None:
    """A size that the host makes larger is what L1 reads; VMXON and VMCSs work as before."""
    msr = Msr.IA32_VMX_BASIC
    full = _get(l1, msr)
    larger = full & ~(0x1FFF << 32) | 0x1000 << 32
    l1.set_feature_msrs({msr: larger})
    assert l1.rdmsr(msr) == Succeed(larger)
    l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    region = l1.prepare_region(l1.sym("vmcs_b"), l1.caps.basic.revision_id ^ 1)
    assert l1.vmptrld(region) == VMfailValid(VmxError.VMPTRLD_INCORRECT_REVISION_ID)
    assert l1.vmxoff() == Succeed()
    assert l1.vmxon(region) == VMfailInvalid()
