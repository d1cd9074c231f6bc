"""An EPT violation that KVM's emulator meets does not tell the rights of the linear address."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EptVpidCap, ExitReason
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="bits 11:9 of the exit qualification are 0",
    correct="bits 11:9 say that it is a user-mode, writable and executable address",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_translate_nested_gpa",
            "expression": "return w->gva_to_gpa(vcpu, w, gpa, access, exception);",
            "replacement": """
            gpa = w->gva_to_gpa(vcpu, w, gpa, access, exception);
            if (gpa == INVALID_GPA && exception && (access & PFERR_GUEST_FINAL_MASK)) {
                if (pte_access & ACC_USER_MASK)
                    exception->exit_qualification |= EPT_VIOLATION_GVA_USER;
                if (pte_access & ACC_WRITE_MASK)
                    exception->exit_qualification |= EPT_VIOLATION_GVA_WRITABLE;
                if (!(pte_access & ACC_EXEC_MASK))
                    exception->exit_qualification |= EPT_VIOLATION_GVA_NX;
            }
            return gpa;""",
        },
    ),
)

OUTSB = b"\x6e"
VALID, TRANSLATED, USER, WRITABLE, RIGHTS = 1 << 7, 1 << 8, 1 << 9, 1 << 10, 7 << 9


@pytest.mark.sdm("Exit Qualification for EPT Violations")
@pytest.mark.needs(EptVpidCap.ADVANCED_EXIT_INFO)
def test_output_of_a_page_that_is_not_mapped(l1: L1) -> None:
    """KVM carries out OUTSB, which L1 does not intercept, from a page that L1's EPT lacks."""
    l1.launchable(l2=OUTSB, ept=True)
    page = l1.alloc()
    l1.write_int(l1.sym("ept_pml4_pt") + page // 4096 * 8, 0)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8, "rsi": page})
    assert seen == Exit(ExitReason.EPT_VIOLATION)
    assert seen.qualification & (VALID | TRANSLATED) == VALID | TRANSLATED
    assert seen.qualification & RIGHTS == USER | WRITABLE
