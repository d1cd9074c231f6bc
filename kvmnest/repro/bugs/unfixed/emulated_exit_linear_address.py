"""The exit for an emulated INS or OUTS has the guest-linear address of an earlier exit."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the guest-linear address is not that of the operand",
    correct="the guest-linear address is that of the operand",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_check_intercept",
            "expression": """
                __nested_vmx_vmexit(vcpu, vm_exit_reason, 0, exit_qualification,
                                    exit_insn_len);""",
            "replacement": """
                {
                    struct x86_emulate_ctxt *ctxt = vcpu->arch.emulate_ctxt;
                    bool out = info->intercept == x86_intercept_outs;
                    struct operand *op = out ? &ctxt->src : &ctxt->dst;
                    int seg = op->addr.mem.seg;
                    unsigned long linear = op->addr.mem.ea;

                    if (!is_64_bit_mode(vcpu))
                        linear = (u32)(linear + vmx_get_segment_base(vcpu, seg));
                    else if (seg == VCPU_SREG_FS || seg == VCPU_SREG_GS)
                        linear += vmx_get_segment_base(vcpu, seg);
                    __nested_vmx_vmexit(vcpu, vm_exit_reason, 0, exit_qualification,
                                        exit_insn_len);
                    if (out || info->intercept == x86_intercept_ins)
                        vmcs12->guest_linear_address = linear;
                }""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
OUTSB = b"\x6e"  # OUTSB [RSI]


@pytest.mark.sdm("Basic VM-Exit Information")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)
def test_linear_address_of_outs(l1: L1) -> None:
    """The guest-linear address of OUTS is that of its memory operand."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + OUTSB)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.UNCONDITIONAL_IO_EXITING)
    operand = l1.sym("l2_data") + 8
    seen = l1.vmlaunch(regs={"rdx": 0x3F8, "rsi": operand})
    if seen == Exit(ExitReason.VMCALL):
        pytest.skip("this kernel makes no VM exit for an emulated instruction, but #UD")
    assert seen == Exit(ExitReason.IO_INSTRUCTION, linear=operand)
