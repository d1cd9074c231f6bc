"""The whole state of a vCPU of L1: read, and written into another vCPU, as in a migration.

Kernel documentation "KVM_GET_NESTED_STATE" and "KVM_SET_NESTED_STATE": the nested state belongs
to the vCPU's state like its registers; a header alone (VMXON without a current VMCS) is a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from kvmnest.kvm import Cap, Kvm, KvmError, MsrList, TscOffset, Vcpu
from kvmnest.vmx.msrs import VMX_MSRS


@dataclass
class VcpuState:
    """What moves with a vCPU."""

    sregs: Any
    regs: Any
    msrs: dict[int, int]
    xcrs: Any
    xsave: Any
    debugregs: Any
    events: Any
    mp_state: Any
    lapic: Any
    nested: bytes | None
    tsc_offset: int | None


class Rewind:
    """Brings a vCPU back to an earlier state of it, outside VMX operation, again and again.

    The arguments of the ioctls are made once. Capability MSRs stay: no guest can write them
    (SDM, "VMX Capability Reporting Facility").
    """

    def __init__(self, state: VcpuState) -> None:
        msrs = {index: value for index, value in state.msrs.items() if index not in VMX_MSRS}
        tsc = None if state.tsc_offset is None else TscOffset(state.tsc_offset)
        steps: list[tuple[Callable[[Vcpu, Any], object], Any]] = [
            # Leaving VMX operation comes first: other state is refused while L2 runs.
            (Vcpu.set_nested_state, state.nested),
            (Vcpu.set_sregs, state.sregs),
            (Vcpu.set_msrs, MsrList(msrs)),
            (Vcpu.set_tsc_offset, tsc),
            (Vcpu.set_xcrs, state.xcrs),
            (Vcpu.set_xsave, state.xsave),
            (Vcpu.set_lapic, state.lapic),
            (Vcpu.set_mp_state, state.mp_state),
            (Vcpu.set_regs, state.regs),
            (Vcpu.set_vcpu_events, state.events),
            (Vcpu.set_debugregs, state.debugregs),
        ]
        self._steps = [(step, value) for step, value in steps if value is not None]

    def __call__(self, vcpu: Vcpu) -> None:
        """Write the state; the vCPU may be another than it was read from. Raises KvmError."""
        for step, value in self._steps:
            step(vcpu, value)


_migrated_msrs: WeakKeyDictionary[Kvm, list[int]] = WeakKeyDictionary()


def save(kvm: Kvm, vcpu: Vcpu, *, apic: bool = True) -> VcpuState:
    """Read the whole state of a vCPU, which has a local APIC in KVM or not."""
    # An exit to userspace leaves an instruction half done; KVM finishes it at the next KVM_RUN
    # (kernel documentation, "KVM_RUN": immediate_exit).
    vcpu.run(immediate_exit=True)
    lapic = vcpu.get_lapic() if apic else None
    nested = vcpu.get_nested_state() if kvm.check_extension(Cap.NESTED_STATE) else None
    return VcpuState(
        sregs=vcpu.get_sregs(),
        regs=vcpu.get_regs(),
        msrs=movable_msrs(kvm, vcpu),
        xcrs=_xcrs(vcpu),
        xsave=vcpu.get_xsave(),
        debugregs=vcpu.get_debugregs(),
        events=vcpu.get_vcpu_events(),
        mp_state=vcpu.get_mp_state(),
        lapic=lapic,
        nested=nested,
        tsc_offset=_tsc_offset(vcpu),
    )


def _xcrs(vcpu: Vcpu) -> Any:
    """The extended control registers; None on a processor without XSAVE, which has none to set."""
    xcrs = vcpu.get_xcrs()
    return xcrs if xcrs.nr_xcrs else None


def restore(vcpu: Vcpu, state: VcpuState) -> None:
    """Write a vCPU's whole state into a fresh vCPU that has its CPUID already."""
    vcpu.set_sregs(state.sregs)
    vcpu.set_msrs(state.msrs)
    if state.tsc_offset is not None:
        vcpu.set_tsc_offset(state.tsc_offset)
    if state.xcrs is not None:
        vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    if state.lapic is not None:
        vcpu.set_lapic(state.lapic)
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_regs(state.regs)
    if state.nested is not None:
        if state.events.smi.smm:
            # The state of VMX operation that waits for RSM is refused outside SMM.
            vcpu.set_vcpu_events(state.events)
        vcpu.set_nested_state(state.nested)
    # Events, blocking of NMIs and debug registers are L2's if L2 runs.
    vcpu.set_vcpu_events(state.events)
    vcpu.set_debugregs(state.debugregs)


def _tsc_offset(vcpu: Vcpu) -> int | None:
    """Distance of the guest's TSC from the host's, which a move on the same host keeps.

    Kernel documentation, "KVM_VCPU_TSC_OFFSET". A written IA32_TSC alone is not enough: KVM takes
    a value near to what a new vCPU would have for an attempt to synchronize vCPUs.
    """
    try:
        return vcpu.get_tsc_offset()
    except KvmError:
        return None  # before Linux 5.16


def movable_msrs(kvm: Kvm, vcpu: Vcpu) -> dict[int, int]:
    """Read each MSR of the index list that this vCPU lets read and write back."""
    # The list depends on the kernel only, and finding it out takes two ioctls an MSR.
    if kvm not in _migrated_msrs:
        indices = [index for index in kvm.msr_index_list() if _movable(vcpu, index)]
        _migrated_msrs[kvm] = indices
    return dict(vcpu.get_msrs(_migrated_msrs[kvm]))


def _movable(vcpu: Vcpu, index: int) -> bool:
    try:
        vcpu.set_msrs(vcpu.get_msrs([index]))
    except KvmError:
        return False
    return True
