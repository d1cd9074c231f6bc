"""The exit for an emulated I/O instruction has exit qualification 0 without I/O bitmaps."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IoQualification, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the exit qualification is 0",
    correct="the exit qualification has port, size and direction",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_is_io_intercepted",
            "expression": """
                if (!nested_cpu_has(vmcs12, CPU_BASED_USE_IO_BITMAPS))
                    return nested_cpu_has(vmcs12, CPU_BASED_UNCOND_IO_EXITING);
                if (info->intercept""",
            "replacement": "if (info->intercept",
        },
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_is_io_intercepted",
            "expression": "return nested_vmx_check_io_bitmaps(vcpu, port, size);",
            "replacement": """
                if (!nested_cpu_has(vmcs12, CPU_BASED_USE_IO_BITMAPS))
                    return nested_cpu_has(vmcs12, CPU_BASED_UNCOND_IO_EXITING);
                return nested_vmx_check_io_bitmaps(vcpu, port, size);""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
OUT = b"\xee"  # OUT DX, AL


@pytest.mark.sdm("Exit Qualification for I/O Instructions")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)
def test_qualification_without_bitmaps(l1: L1) -> None:
    """With "unconditional I/O exiting" the qualification is filled in as with bitmaps."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + OUT)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.UNCONDITIONAL_IO_EXITING)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8})
    if seen == Exit(ExitReason.VMCALL):
        pytest.skip("this kernel makes no VM exit for an emulated instruction, but #UD")
    qualification = IoQualification(1, input=False, port=0x3F8).encode()
    assert seen == Exit(ExitReason.IO_INSTRUCTION, qualification=qualification)
