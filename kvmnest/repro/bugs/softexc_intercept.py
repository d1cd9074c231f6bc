"""#BP and #OF of L2 do not reach L1 that intercepts them."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IntrType, Vector, intr_info
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="kvm: nVMX: Allow L1 to intercept software exceptions (#BP and #OF)",
    hash="ef85b6738543",
    cve="CVE-2016-9588",
    since="v3.1",
    since_by="source",
    fixed="v4.10-rc1",
    vulnerable="#BP of L2, which L1 intercepts, ends KVM_RUN or goes to L2",
    correct="INT3 of L2 exits to L1 with #BP as a software exception",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_l1_wants_exit",
        "expression": (
            "return vmcs12->exception_bitmap & (1u << (intr_info & INTR_INFO_VECTOR_MASK));"
        ),
        "replacement": (
            "return (intr_info & INTR_INFO_INTR_TYPE_MASK) == INTR_TYPE_HARD_EXCEPTION && "
            "(vmcs12->exception_bitmap & (1u << (intr_info & INTR_INFO_VECTOR_MASK)));"
        ),
    },
)


@pytest.mark.sdm("Exception Bitmap")
def test_int3(l1: L1) -> None:
    """The exception bitmap holds for INT3 and INTO too."""
    vmcs = l1.launchable(l2=code.INT3)
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.BP
    info = intr_info(Vector.BP, IntrType.SOFTWARE_EXCEPTION)
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI, intr_info=info)
