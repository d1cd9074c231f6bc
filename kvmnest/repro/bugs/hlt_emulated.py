"""HLT of L2 that KVM emulates is #UD."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, PinCtl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Emulate HLT in L2 if it's not intercepted",
    since="07721feee46b (v5.6)",
    since_by="message",
    fixed="v6.15",
    vulnerable="HLT is #UD",
    correct="L2 gets behind HLT",
    params={"force_emulation_prefix": "1"},
    edit_since="6.15",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_check_intercept",
        "expression": """
            if (!nested_cpu_has(vmcs12, CPU_BASED_HLT_EXITING))
                return X86EMUL_CONTINUE;""",
        "replacement": """
            if (!nested_cpu_has(vmcs12, CPU_BASED_HLT_EXITING))
                return X86EMUL_UNHANDLEABLE;""",
    },
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator


@pytest.mark.sdm("HLT - Halt")
@pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_hlt_completes(l1: L1) -> None:
    """L1 does not intercept HLT; the VMX-preemption timer ends it where KVM halts."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + b"\xf4")
    vmcs.clear_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.HLT_EXITING)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 100_000
    seen = l1.vmlaunch()
    assert isinstance(seen, Exit)
    assert seen.rip == l1.sym("l2_code") + 6
