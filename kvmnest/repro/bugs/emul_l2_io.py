"""An emulated IN or OUT of L2 passes L1's I/O intercept."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import (
    Field,
    ProcCtl,
)
from kvmnest.vmx.outcome import (
    HostExit,
)

BUG = Bug(
    subject="KVM: nVMX: Check IO instruction VM-exit conditions",
    hash="35a571346a94",
    cve="CVE-2020-2732",
    since="v3.1",
    since_by="source",
    fixed="v5.6-rc4",
    vulnerable="OUT of L2 reaches userspace although L1 intercepts it",
    correct="L2 does not execute an OUT that L1 intercepts",
    params={"force_emulation_prefix": "1"},
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_check_intercept_io",
        "expression": "return intercept ? X86EMUL_UNHANDLEABLE : X86EMUL_CONTINUE;",
        "replacement": "return 0 && intercept ? X86EMUL_UNHANDLEABLE : X86EMUL_CONTINUE;",
    },
    newer=(
        {
            "since": "7.2",
            "function": "vmx_check_intercept",
            "expression": "if (!vmx_is_io_intercepted(vcpu, info, &exit_qualification))",
            "replacement": "if (!vmx_is_io_intercepted(vcpu, info, &exit_qualification) || 1)",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator
OUT = b"\xee"  # OUT DX, AL


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_emulated_out(l1: L1) -> None:
    """An intercept of L1 holds, whoever executes the instruction: the CPU or KVM."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + OUT)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.UNCONDITIONAL_IO_EXITING)
    seen = l1.vmlaunch(regs={"rdx": 0x3F8, "rax": 0x5A})
    assert not isinstance(seen, HostExit), f"the OUT came to userspace: {seen!r}"
