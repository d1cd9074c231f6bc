"""Finishing an INS of L2 asks L1's I/O bitmap again."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Don't (re)check L1 intercepts when completing userspace I/O",
    cve="CVE-2025-40026",
    since="8a76d7f25f8f (v3.0)",
    since_by="Fixes",
    fixed="v6.18, v6.1.158, v6.12.57",
    vulnerable="INSB that began exits, or is #UD, when userspace answers",
    correct="INSB that began ends without exit",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "x86_emulate_instruction",
        "expression": "is_guest_mode(vcpu) && !(emulation_type & EMULTYPE_NO_DECODE)",
        "replacement": "is_guest_mode(vcpu)",
    },
)

PORT = 0x3F8


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
@pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)
def test_bitmap_changes_meanwhile(l1: L1) -> None:
    """The port's bit is set between the exit to userspace and its answer."""
    vmcs = l1.launchable(l2=b"\x6c")  # INSB
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_IO_BITMAPS)
    vmcs[Field.IO_BITMAP_A], vmcs[Field.IO_BITMAP_B] = bitmap, _ = l1.alloc(), l1.alloc()
    data = l1.sym("l2_data")
    l1.vmlaunch(regs={"rdx": PORT, "rdi": data})  # comes to userspace at the INSB
    l1.write_int(bitmap + PORT // 8, 1 << PORT % 8, 1)
    l1.vcpu.set_io_data(b"\x42")
    assert l1.resume() == Exit(ExitReason.VMCALL, rip=l1.sym("l2_code") + 1)
    assert l1.read_int(data, 1) == 0x42
