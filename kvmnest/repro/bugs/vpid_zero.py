"""VPID 0 is accepted."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Proc2Ctl, ProcCtl, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="nVMX x86: Check VPID value on vmentry of L2 guests",
    since="v4.4",
    since_by="source",
    fixed="v4.19-rc5",
    vulnerable="L2 runs with VPID 0",
    correct="VM entry fails with error 7, an invalid control field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_check_vm_execution_controls",
        "expression": "CC(nested_cpu_has_vpid(vmcs12) && !vmcs12->virtual_processor_id))",
        "replacement": "0)",
    },
)


@pytest.mark.sdm("VM-Execution Control Fields")
@pytest.mark.needs(Proc2Ctl.ENABLE_VPID)
def test_vpid_0(l1: L1) -> None:
    """VPID 0 is the host's."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.ENABLE_VPID)
    vmcs[Field.VIRTUAL_PROCESSOR_ID] = 0
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
