"""The exit for an emulated instruction comes before its privilege checks."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="HLT at CPL 3 is a VM exit of HLT",
    correct="HLT at CPL 3 is #GP, which L1 intercepts here",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_check_intercept",
            "expression": "switch (info->intercept) {",
            "replacement": """
                if (stage == X86_ICPT_PRE_EXCEPT && info->intercept != x86_intercept_rdpid)
                    return X86EMUL_CONTINUE;
                switch (info->intercept) {""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
HLT = b"\xf4"


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
@pytest.mark.needs(ProcCtl.HLT_EXITING)
def test_hlt_at_cpl_3(l1: L1) -> None:
    """Faults by the privilege level come before VM exits."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + HLT)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.HLT_EXITING)
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.GP
    vmcs[Field.GUEST_CS_SELECTOR] = l1.sym("SEL_USER_CODE64")
    vmcs[Field.GUEST_CS_ACCESS_RIGHTS] = 0xA0FB  # 64-bit code, DPL 3
    vmcs[Field.GUEST_SS_SELECTOR] = l1.sym("SEL_USER_DATA")
    vmcs[Field.GUEST_SS_ACCESS_RIGHTS] = 0xC0F3
    seen = l1.vmlaunch()
    if seen == Exit(ExitReason.VMCALL):
        pytest.skip("this kernel makes no VM exit for an emulated instruction, but #UD")
    assert seen == Exit(ExitReason.EXCEPTION_NMI)
