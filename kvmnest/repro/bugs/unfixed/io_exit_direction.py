"""The exit for an emulated IN or INS says OUT."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IoQualification, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="bit 3 of the exit qualification is 0 for IN",
    correct="bit 3 of the exit qualification is 1 for IN",
    params={"force_emulation_prefix": "1"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_is_io_intercepted",
            "expression": "*exit_qualification = ((unsigned long)port << 16) | (size - 1);",
            "replacement": """
                *exit_qualification = ((unsigned long)port << 16) | (size - 1);
                if (info->intercept == x86_intercept_in || info->intercept == x86_intercept_ins)
                    *exit_qualification |= BIT(3);""",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
IN = b"\xec"  # IN AL, DX


@pytest.mark.sdm("Exit Qualification for I/O Instructions")
@pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)
def test_direction(l1: L1) -> None:
    """IN has the direction bit set."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + IN)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_IO_BITMAPS)
    vmcs[Field.IO_BITMAP_A], vmcs[Field.IO_BITMAP_B] = bitmap, _ = l1.alloc(), l1.alloc()
    l1.write(bitmap, b"\xff" * 4096)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8})
    if seen == Exit(ExitReason.VMCALL):
        pytest.skip("this kernel makes no VM exit for an emulated instruction, but #UD")
    qualification = IoQualification(1, input=True, port=0x3F8).encode()
    assert seen == Exit(ExitReason.IO_INSTRUCTION, qualification=qualification)
