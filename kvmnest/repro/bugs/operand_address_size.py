"""The operand of a VMX instruction with 32-bit addresses is sought by 64 bits."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx.outcome import Succeed

BUG = Bug(
    subject="KVM: nVMX: Apply addr size mask to effective address for VMX instructions",
    hash="8570f9e881e3",
    since="v3.1",
    since_by="source",
    fixed="v5.0",
    vulnerable="bits 63:32 of the base register count",
    correct="the address-size prefix cuts the effective address to 32 bits",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "get_vmx_mem_address",
        "expression": "off &= 0xffffffff;",
        "replacement": "{}",
    },
)

VMPTRST = b"\x67\x0f\xc7\x3f"  # [EDI]


@pytest.mark.sdm("VMPTRST-Store Pointer to Virtual-Machine Control Structure")
def test_address_size_prefix(l1: L1) -> None:
    """VMPTRST stores at EDI, whatever the upper half of RDI holds."""
    vmcs = l1.launchable()
    vmcs.flush()
    page = l1.alloc()
    assert l1.call(VMPTRST, regs={"rdi": 1 << 40 | page}) == Succeed()
    assert l1.read_int(page) == vmcs.address
