"""PAUSE of L2 that KVM emulates passes by PAUSE exiting."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Check PAUSE_EXITING, not BUS_LOCK_DETECTION, on PAUSE emulation",
    since="4984563823f0 (v6.4)",
    since_by="Fixes",
    fixed="v6.15",
    vulnerable="PAUSE completes",
    correct="PAUSE exits",
    params={"force_emulation_prefix": "1"},
    edit_since="6.15",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_check_intercept",
        "expression": "!nested_cpu_has(vmcs12, CPU_BASED_PAUSE_EXITING)",
        "replacement": "!nested_cpu_has2(vmcs12, CPU_BASED_PAUSE_EXITING)",
    },
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
@pytest.mark.needs(ProcCtl.PAUSE_EXITING)
def test_pause_exits(l1: L1) -> None:
    """L1 intercepts PAUSE."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + b"\xf3\x90")
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.PAUSE_EXITING)
    assert l1.vmlaunch() == Exit(ExitReason.PAUSE)
