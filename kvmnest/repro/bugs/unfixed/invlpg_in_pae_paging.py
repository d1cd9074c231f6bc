"""INVLPG of an L2 with PAE paging kills the host's kernel, without EPT."""

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the host's kernel dies (BUG in shadow_walk_init_using_root)",
    correct="INVLPG completes, and L2 goes on",
    death="crashed: ",
    params={"ept": "0"},
    fix=(
        {
            "file": "arch/x86/kvm/mmu/mmu.c",
            "function": "__kvm_mmu_invalidate_addr",
            "expression": "if (!VALID_PAGE(root_hpa)) return;",
            "replacement": """
                if (!VALID_PAGE(root_hpa))
                    return;
                if (root_hpa != mmu->root.hpa && mmu->root_role.level == PT32E_ROOT_LEVEL)
                    return;""",
        },
    ),
)

INVLPG = b"\x0f\x01\x3f"  # INVLPG [EDI]


@pytest.mark.sdm("INVLPG-Invalidate TLB Entries")
def test_invlpg(l1: L1) -> None:
    """L1, in 64-bit mode, does not intercept INVLPG of an L2 with PAE paging; KVM does.

    At the second entry KVM has kept the root of L1's paging beside that of L2's.
    """
    vmcs = l1.launchable(l2=code.VMCALL + INVLPG, mode=L2Mode.PAE, ept=False)
    if l1.caps.clamp(ProcCtl(0)) & ProcCtl.INVLPG_EXITING:
        pytest.skip("needs INVLPG exiting that can be 0")
    vmcs.clear_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.INVLPG_EXITING)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    l1.skip_l2_instruction(len(code.VMCALL))
    assert l1.vmresume(regs={"rdi": l1.sym("l2_data")}) == Exit(ExitReason.VMCALL)
