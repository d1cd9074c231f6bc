"""Memory operand outside memory gives a page fault.

The page fault also told L1 what was on the host's stack (CVE-2019-7222); that was stopped earlier,
in v5.0-rc6.
"""

import pytest

from kvmnest.l1 import L1, VmLost
from kvmnest.repro import Bug
from kvmnest.vmx.outcome import (
    Fault,
)

BUG = Bug(
    subject="KVM: VMX: Properly handle kvm_read/write_guest_virt*() result",
    hash="7a35e515a705",
    since="v3.1",
    since_by="source",
    fixed="v5.8-rc1",
    vulnerable="VMPTRLD is a page fault, although its operand is mapped",
    correct="VMPTRLD fails, or KVM_RUN ends with an internal error",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "kvm_handle_memory_failure",
        "expression": "if (r == X86EMUL_PROPAGATE_FAULT) {",
        "replacement": "if (r) {",
    },
)

NOWHERE = 0x10000000  # mapped by L1, but there is no memory


@pytest.mark.sdm("Conventions")
def test_operand_in_no_memory(l1: L1) -> None:
    """Memory that is not there reads as all ones; KVM may give up too, but it must not lie."""
    l1.enter_vmx()
    try:
        seen = l1.vmptrld(0, at=NOWHERE)
    except VmLost as lost:
        if lost.kind != "internal error":
            raise
        return
    assert not isinstance(seen, Fault), f"{seen!r}"
