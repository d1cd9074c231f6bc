"""MSR areas may be longer than the advertised limit."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, VmxError
from kvmnest.vmx.outcome import EntryFailure, VMfailValid

BUG = Bug(
    subject="kvm: nvmx: limit atomic switch MSRs",
    since="v4.0",
    since_by="source",
    fixed="v5.4-rc1",
    vulnerable="KVM works through a longer MSR-load area and L2 runs",
    correct="VM entry fails, at the first entry beyond the limit or before it loads any",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_load_msr",
        "expression": "if (unlikely(i >= max_msr_list_size)) goto fail;",
        "replacement": "if (0 && i >= max_msr_list_size) goto fail;",
    },
    newer=(
        {
            "since": "7.2",
            "function": "nested_vmx_max_atomic_switch_msrs",
            "expression": "return (vmx_misc_max_msr(vmx_misc) + 1) * VMX_MISC_MSR_LIST_MULTIPLIER;",
            "replacement": "return ~0u;",
        },
    ),
)


@pytest.mark.sdm("Loading MSRs")
def test_one_entry_too_many(l1: L1) -> None:
    """Beyond the maximum in IA32_VMX_MISC the SDM promises nothing; Linux fails the entry.

    From 6.16 on the count itself is refused, as a control.
    """
    count = l1.caps.misc.msr_list_max + 1
    area = l1.alloc((16 * count + 4095) // 4096)
    for number in range(count):
        l1.write_int(area + 16 * number, Msr.KERNEL_GS_BASE)
    vmcs = l1.launchable()
    vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR] = area
    vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT] = count
    assert l1.vmlaunch() in (
        EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=count),
        VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD),
    )
