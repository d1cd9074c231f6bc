"""INVPCID of a guest without paging makes the host's kernel jump to address 0."""

import pytest

from kvmnest.kvm import exits
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Cr0, Efer

BUG = Bug(
    subject="KVM: x86/mmu: fix NULL pointer dereference on guest INVPCID",
    hash="9f46c187e2e6",
    cve="CVE-2022-1789",
    since="eb4b248e152d (v4.19)",
    since_by="message",
    fixed="v5.18, v5.17.11",
    vulnerable="the host's kernel oopses",
    correct="INVPCID completes: there is nothing to invalidate",
    death="crashed: ",
    params={"ept": "0"},
    edit={
        "file": "arch/x86/kvm/mmu/mmu.c",
        "function": "kvm_mmu_invpcid_gva",
        "expression": "if (mmu->invlpg) mmu->invlpg(vcpu, gva, mmu->root.hpa);",
        "replacement": "mmu->invlpg(vcpu, gva, mmu->root.hpa);",
    },
    newer=(
        {
            "since": "6.12",
            "function": "kvm_mmu_invalidate_addr",
            "expression": "if (!mmu->sync_spte) return;",
            "replacement": "if (!mmu->sync_spte) mmu->sync_spte(vcpu, NULL, 0);",
        },
    ),
)

INVPCID = b"\x66\x0f\x38\x82\x07"  # INVPCID EAX, [EDI]
INDIVIDUAL_ADDRESS = 0


@pytest.mark.sdm("INVPCID-Invalidate Process-Context Identifier")
def test_invpcid_without_paging(l1: L1) -> None:
    """A vCPU in protected mode invalidates one address; KVM without EPT intercepts that."""
    page = l1.alloc()
    l1.write(page, INVPCID + code.out8(0x80))
    sregs, regs = l1.vcpu.get_sregs(), l1.vcpu.get_regs()
    sregs.cr0 &= ~Cr0.PG
    sregs.efer &= ~(Efer.LME | Efer.LMA)
    sregs.cs.l, sregs.cs.db = 0, 1
    l1.vcpu.set_sregs(sregs)
    regs.rip, regs.rax, regs.rdi, regs.rflags = page, INDIVIDUAL_ADDRESS, page + 256, 2
    l1.vcpu.set_regs(regs)
    assert isinstance(l1.vcpu.run(), exits.IoExit)
