"""Unrestricted guest is accepted without EPT.

It came with unrestricted guests for L2; which release had them first was not looked up.
"""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Proc2Ctl, ProcCtl, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="KVM: nVMX: Unrestricted guest mode requires EPT",
    fixed="v5.0-rc1",
    vulnerable="L2 runs as an unrestricted guest without EPT",
    correct="VM entry fails with error 7, an invalid control field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_unrestricted_guest_controls",
        "expression": "return -EINVAL;",
        "replacement": "return 0;",
    },
)


@pytest.mark.sdm("VM-Execution Control Fields")
@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
def test_unrestricted_guest_without_ept(l1: L1) -> None:
    """ "Unrestricted guest" needs "enable EPT"."""
    vmcs = l1.launchable(ept=False)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.UNRESTRICTED_GUEST)
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
