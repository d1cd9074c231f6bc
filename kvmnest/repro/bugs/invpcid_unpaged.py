"""INVPCID of a guest without paging kills the host's kernel."""

import pytest

from kvmnest.kvm import exits
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug

BUG = Bug(
    subject="KVM: x86/mmu: fix NULL pointer dereference on guest INVPCID",
    cve="CVE-2022-1789",
    hash="9f46c187e2e6",
    since="v4.19",
    since_by="source",
    fixed="v5.19, v5.17.11",
    vulnerable="the host's kernel calls a NULL pointer",
    correct="INVPCID executes",
    death="crashed: ",
    params={"ept": "0"},
    edit={
        "file": "arch/x86/kvm/mmu/mmu.c",
        "function": "kvm_mmu_invpcid_gva",
        "expression": (
            "if (pcid == kvm_get_active_pcid(vcpu)) { if (mmu->invlpg) "
            "mmu->invlpg(vcpu, gva, mmu->root.hpa);"
        ),
        "replacement": (
            "if (pcid == kvm_get_active_pcid(vcpu)) { mmu->invlpg(vcpu, gva, mmu->root.hpa);"
        ),
    },
    newer=(
        {
            "since": "7.2",
            "function": "kvm_mmu_invalidate_addr",
            "expression": "if (!mmu->sync_spte) return;",
            "replacement": "if (!mmu->sync_spte) mmu->sync_spte(vcpu, NULL, 0);",
        },
    ),
)

INVPCID = b"\x66\x0f\x38\x82\x07"  # INVPCID EAX, [EDI]
PG, LME_AND_LMA = 1 << 31, 0x500


@pytest.mark.sdm("INVPCID-Invalidate Process-Context Identifier")
def test_invpcid_in_protected_mode(l1: L1) -> None:
    """The vCPU runs 32-bit code without paging; EAX is 0, an individual address."""
    page = l1.alloc()
    l1.write(page, INVPCID + code.out8(0x80))
    sregs, regs = l1.vcpu.get_sregs(), l1.vcpu.get_regs()
    sregs.cr0 &= ~PG
    sregs.efer &= ~LME_AND_LMA
    sregs.cs.l, sregs.cs.db = 0, 1
    l1.vcpu.set_sregs(sregs)
    regs.rip, regs.rax, regs.rdi, regs.rflags = page, 0, page + 256, 2
    l1.vcpu.set_regs(regs)
    assert isinstance(l1.vcpu.run(), exits.IoExit)
