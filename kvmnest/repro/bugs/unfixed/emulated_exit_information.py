"""The exit for an emulated instruction has the instruction information of another exit."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import BasicCap, ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the instruction information is what the exit before left: not FS, not 64 bits",
    correct="the instruction information of OUTS has its segment and address size",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_check_intercept",
            "expression": "return X86EMUL_INTERCEPTED;",
            "replacement": """
                if (info->intercept == x86_intercept_ins ||
                    info->intercept == x86_intercept_outs)
                    vmcs12->vmx_instruction_info = (info->ad_bytes >> 2) << 7 |
                        (info->intercept == x86_intercept_outs ?
                         vcpu->arch.emulate_ctxt->seg_override << 15 : 0);
                return X86EMUL_INTERCEPTED;""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
OUTSB_FS = b"\x64\x6e"  # OUTSB FS:[RSI]


@pytest.mark.sdm("VM-Exit Instruction Information as Used for INS and OUTS")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING, BasicCap.INS_OUTS_INFO)
def test_information_of_outs(l1: L1) -> None:
    """Bits 9:7 are the address size (2: 64 bits), bits 17:15 the segment register (4: FS)."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + OUTSB_FS)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.UNCONDITIONAL_IO_EXITING)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8, "rsi": l1.sym("l2_data")})
    if seen == Exit(ExitReason.VMCALL):
        pytest.skip("this kernel makes no VM exit for an emulated instruction, but #UD")
    assert seen == Exit(ExitReason.IO_INSTRUCTION)
    assert (seen.info >> 7 & 7, seen.info >> 15 & 7) == (2, 4)
