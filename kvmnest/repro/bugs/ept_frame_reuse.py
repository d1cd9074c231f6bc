"""The shadow page of a large EPT page is used for another large page."""

import pytest

from kvmnest.kvm import Memory
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import EptVpidCap, ExitReason, Proc2Ctl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Fix shadow paging use-after-free due to unexpected GFN",
    hash="0cb2af2ea66a",
    cve="CVE-2026-46113",
    since="2032a93d66fa (v2.6.36)",
    since_by="CVE",
    fixed="v7.1, v6.1.176, v6.12.88",
    vulnerable="the host's kernel warns or oopses when the memory slot goes",
    correct="L2 writes to the new frame",
    death="crashed: ",
    edit={
        "file": "arch/x86/kvm/mmu/mmu.c",
        "function": "kvm_mmu_get_child_sp",
        "expression": (
            "spte_to_child_sp(*sptep)->gfn == gfn && "
            "spte_to_child_sp(*sptep)->role.word == role.word)"
        ),
        "replacement": "1)",
    },
)

LOAD, STORE = b"\x48\x8b\x07", b"\x48\x89\x87\0\x10\0\0"  # MOV RAX, [RDI]; MOV [RDI+1000h], RAX
ADDRESS, INDEX = 200 << 21, 200  # 2 MiB, linear and guest-physical for L2, and their entries
FRAME, SIZE, SLOT = 0x20000000, 1 << 21, 7
RIGHTS = 0xB7  # a large page: all accesses, write-back


@pytest.mark.sdm("The Extended Page Table Mechanism (EPT)")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.PAGE_2MB)
def test_another_large_page(l1: L1) -> None:
    """The host's userspace makes a large EPT entry name another frame."""
    memory, entry = Memory(2 * SIZE), l1.sym("ept_pml4_pd") + 8 * INDEX
    memory.write(0, b"\x01")
    l1.vm.add_memory(SLOT, FRAME, memory)
    l1.launchable(l2=LOAD + code.out8(0x80) + STORE, ept=True)
    l1.write_int(l1.sym("l2_pml4_pd") + 8 * INDEX, ADDRESS | 0x87)
    l1.write_int(entry, FRAME | RIGHTS)
    l1.vmlaunch(regs={"rdi": ADDRESS})  # comes to userspace at the OUT
    l1.write_int(entry, FRAME + SIZE | RIGHTS)
    assert l1.resume() == Exit(ExitReason.VMCALL)
    l1.vm.remove_memory(SLOT)
    assert memory.read(SIZE + 4096, 1) == b"\x01"
