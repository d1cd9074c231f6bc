"""A VM exit leaves L1 the limits of GDTR and IDTR that it had before."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug

BUG = Bug(
    subject="KVM: nVMX: set IDTR and GDTR limits when loading L1 host state",
    hash="21f2d5511838",
    since="v3.1",
    since_by="source",
    fixed="v4.14",
    vulnerable="the limit of IDTR is the one from before the entry",
    correct="the limit of IDTR is FFFFH",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "load_vmcs12_host_state",
        "expression": "vmcs_write32(GUEST_IDTR_LIMIT, 0xFFFF);",
        "replacement": "{}",
    },
)

LIDT = b"\x0f\x01\x1f"  # of the 10 bytes at RDI


@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_limit_of_idtr(l1: L1) -> None:
    """L1 sets a limit of its own, enters L2, and looks at it behind the exit."""
    l1.launchable()
    pointer = l1.alloc()
    l1.write(pointer, (0xFFF).to_bytes(2, "little") + l1.sym("l1_idt").to_bytes(8, "little"))
    l1.call(LIDT, regs={"rdi": pointer})
    l1.vmlaunch()
    assert l1.vcpu.get_sregs().idt.limit == 0xFFFF
