"""A failed VM entry leaves L2's TSC multiplier to the emulator."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import EntryFailure, Succeed

BUG = Bug(
    vulnerable="an emulated RDTSC of L1 gives L2's time",
    correct="an emulated RDTSC of L1 gives the time that RDTSC gives",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_enter_non_root_mode",
            "expression": """
                if (vmcs12->cpu_based_vm_exec_control & CPU_BASED_USE_TSC_OFFSETTING)
                    vcpu->arch.tsc_offset -= vmcs12->tsc_offset;""",
            "replacement": """
                vcpu->arch.tsc_offset = vcpu->arch.l1_tsc_offset;
                vcpu->arch.tsc_scaling_ratio = vcpu->arch.l1_tsc_scaling_ratio;""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
RDTSC = b"\x0f\x31"


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
def test_emulated_rdtsc(l1: L1) -> None:
    """TSC offset and multiplier act in VMX non-root operation alone."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TSC_OFFSETTING)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.USE_TSC_SCALING)
    vmcs[Field.TSC_MULTIPLIER] = 1 << 52  # L2's TSC is 16 times as fast
    vmcs[Field.GUEST_CR3] |= 1 << 52  # beyond every physical-address width
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
    seen = l1.call(EMULATED + RDTSC)
    after = l1.rdtsc()
    assert isinstance(seen, Succeed)
    assert isinstance(after, Succeed)
    assert seen.regs["rdx"] << 32 | seen.regs["rax"] <= after.value
