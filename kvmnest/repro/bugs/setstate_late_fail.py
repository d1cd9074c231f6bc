"""A nested state that fails late leaves L1 with L2's memory."""

import contextlib

import pytest

from kvmnest.kvm import Cap, KvmError
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Proc2Ctl

BUG = Bug(
    subject="KVM: nVMX: Reset MMU back to the root MMU if loading L2 state fails for !VM-Entry",
    cve="CVE-2026-99176",
    fixed="v6.1.192, v6.12.115",
    vulnerable="L1's addresses are translated by the EPT that L1 made for L2",
    correct="L1 has its own memory",
    death="VmLost: ",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_enter_non_root_mode",
        "expression": "nested_ept_uninit_mmu_context(vcpu);",
        "replacement": "",
    },
)


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(Cap.NESTED_STATE, Proc2Ctl.ENABLE_EPT)
def test_bad_cr3_of_l2(l1: L1) -> None:
    """L2's CR3 is checked when KVM has switched to L2's memory."""
    vmcs = l1.launchable(l2=code.out8(0x80), ept=True)
    page, other, table = l1.alloc(), l1.alloc(), l1.alloc()
    entry = l1.sym("ept_pml4_pt") + page // 4096 * 8
    l1.write_int(entry, l1.read_int(entry) + other - page)
    l1.write(table, l1.read(l1.sym("l2_pml4"), 4096))
    vmcs[Field.GUEST_CR3] = table  # a value that the state has once
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    good = table.to_bytes(8, "little")
    state = l1.vcpu.get_nested_state().replace(good, good[:7] + b"\x10")
    with contextlib.suppress(KvmError):
        l1.vcpu.set_nested_state(state)
    l1.write_int(page, 0x1111)
    l1.write_int(other, 0x2222)
    assert isinstance(l1.cpu.resume(), list)  # L1 ends what it was at
    seen = l1.call(b"\x48\x8b\x07", regs={"rdi": page})  # MOV RAX, [RDI]
    assert seen.regs["rax"] == 0x1111
