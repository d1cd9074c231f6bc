"""EPT violation that KVM's emulator meets has bits 7 and 8 of an earlier exit."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Proc2Ctl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: VMX: Synthesize nested EPT violation GVA_IS_VALID/GVA_TRANSLATED bits",
    fixed="v7.2, v6.12.117",
    vulnerable="bits 7 and 8 of the exit qualification are those of another exit",
    correct="bit 7 is 1 and bit 8 is 0: there is a linear address, which is not translated yet",
    edit_since="7.2",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_ept_inject_page_fault",
        "expression": "exit_qualification |= fault->exit_qualification & mask;",
        "replacement": "exit_qualification |= vmx_get_exit_qual(vcpu) & mask;",
    },
)


LINEAR, INDEX = 200 << 21, 200  # 2 MiB of L2's linear addresses, and their entry


@pytest.mark.sdm("Exit Qualification for EPT Violations")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_outs_through_a_page_table_that_is_not_mapped(l1: L1) -> None:
    """KVM carries out OUTSB, which L1 does not intercept, and walks L2's and L1's tables itself."""
    l1.launchable(l2=b"\x6e", ept=True)
    table = l1.alloc()
    l1.write_int(l1.sym("l2_pml4_pd") + 8 * INDEX, table | 7)
    l1.write_int(l1.sym("ept_pml4_pt") + table // 4096 * 8, 0)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8, "rsi": LINEAR})
    assert seen == Exit(ExitReason.EPT_VIOLATION)
    assert seen.qualification & 0x180 == 0x80
