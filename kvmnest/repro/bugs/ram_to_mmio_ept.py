"""An EPT entry that turns from memory to none is written over a live one."""

import pytest

from kvmnest.kvm import exits
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Proc2Ctl
from kvmnest.vmx.outcome import HostExit

BUG = Bug(
    subject="KVM: x86/mmu: Drop/zap existing present SPTE even when creating an MMIO SPTE",
    cve="CVE-2026-23401",
    since="a54aa15c6bda (v5.16)",
    since_by="Fixes",
    fixed="v6.1.170, v6.12.85",
    vulnerable="the kernel warns: the entry for memory is still there",
    correct="L2's write is an access to MMIO, and the kernel is silent",
    edit={
        "file": "arch/x86/kvm/mmu/mmu.c",
        "function": "mmu_set_spte",
        "expression": "if (is_shadow_present_pte(*sptep)) {",
        "replacement": """
            if (unlikely(is_noslot_pfn(pfn))) {
                mark_mmio_spte(vcpu, sptep, gfn, pte_access);
                return RET_PF_EMULATE;
            }
            if (is_shadow_present_pte(*sptep)) {""",
    },
)

LOAD, STORE = b"\x48\x8b\x07", b"\x48\x89\x07"  # MOV RAX, [RDI]; MOV [RDI], RAX
NOWHERE = 0x10000000
READ, ALL = 1, 7


@pytest.mark.sdm("EPT and Physical-Memory Accesses")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_memory_becomes_none(l1: L1) -> None:
    """The host's userspace writes to L1's EPT behind KVM's back."""
    l1.launchable(l2=LOAD + code.out8(0x80) + STORE, ept=True)
    page = l1.alloc()
    entry = l1.sym("ept_pml4_pt") + page // 4096 * 8
    l1.write_int(entry, l1.read_int(entry) & ~ALL | READ)
    l1.vmlaunch(regs={"rdi": page, "rax": 0x80})  # comes to userspace at the OUT
    l1.write_int(entry, NOWHERE | 6 << 3 | ALL)
    seen = l1.resume()
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.MmioExit)
    assert seen.exit.phys_addr == NOWHERE
