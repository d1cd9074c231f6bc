"""Dirty log lacks the page of an emulated atomic instruction."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Mark target gfn of emulated atomic instruction as dirty",
    cve="CVE-2024-35804",
    since="1c2361f667f3 (v5.19)",
    since_by="Fixes",
    fixed="v6.9, v6.1.85",
    vulnerable="KVM_GET_DIRTY_LOG lacks the page that LOCK CMPXCHG of L2 wrote",
    correct="KVM_GET_DIRTY_LOG has the page",
    params={"force_emulation_prefix": "1"},
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "emulator_cmpxchg_emulated",
        "expression": "kvm_vcpu_mark_page_dirty(vcpu, gpa_to_gfn(gpa));",
        "replacement": "",
    },
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
CMPXCHG = b"\xf0\x48\x0f\xb1\x0f"  # LOCK CMPXCHG [RDI], RCX


@pytest.mark.sdm("VMX Non-Root Operation")
def test_locked_compare_and_exchange(l1: L1) -> None:
    """A page that L2 changes by an atomic instruction is one that a migration has to copy."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    l1.launchable(l2=EMULATED + CMPXCHG)
    page = l1.alloc()
    l1.vm.add_memory(0, 0, l1.memory, log_dirty=True)
    l1.vm.dirty_log(0)
    assert l1.vmlaunch(regs={"rdi": page, "rax": 0, "rcx": 7}) == Exit(ExitReason.VMCALL)
    assert l1.read_int(page) == 7
    assert l1.vm.dirty_log(0)[page // 4096 // 8] >> page // 4096 % 8 & 1
