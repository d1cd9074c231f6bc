"""An instruction of L2 that KVM emulates and L1 intercepts is #UD."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Synthesize nested VM-Exit for supported emulation intercepts",
    since="07721feee46b (v5.6)",
    since_by="message",
    fixed="v6.15",
    vulnerable="SGDT is #UD",
    correct="SGDT exits",
    params={"force_emulation_prefix": "1"},
    edit_since="6.15",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_check_intercept",
        "expression": """
            __nested_vmx_vmexit(vcpu, vm_exit_reason, 0, exit_qualification,
                                exit_insn_len);
            return X86EMUL_INTERCEPTED;""",
        "replacement": """
            exception->vector = UD_VECTOR;
            exception->error_code_valid = false;
            return X86EMUL_PROPAGATE_FAULT;""",
    },
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
def test_sgdt_exits(l1: L1) -> None:
    """L1 intercepts accesses to the descriptor-table registers."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + b"\x0f\x01\x07")  # SGDT [RDI]
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    seen = l1.vmlaunch(regs={"rdi": l1.sym("l2_data")})
    assert seen == Exit(ExitReason.GDTR_IDTR)
