"""An instruction of L2 that KVM emulates passes L1's intercept."""

from pathlib import Path

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import (
    Field,
    ProcCtl,
)

BUG = Bug(
    subject="KVM: nVMX: Don't emulate instructions in guest mode",
    hash="07721feee46b",
    cve="CVE-2020-2732",
    since="v3.1",
    since_by="source",
    fixed="v5.6-rc4",
    vulnerable="RDTSC of L2 is executed although L1 intercepts it",
    correct="L2 does not execute an RDTSC that L1 intercepts",
    params={"force_emulation_prefix": "1"},
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_check_intercept",
        "expression": (
            "/* TODO: check more intercepts... */ default: break; } return X86EMUL_UNHANDLEABLE;"
        ),
        "replacement": (
            "/* TODO: check more intercepts... */ default: break; } return X86EMUL_CONTINUE;"
        ),
    },
    newer=(
        {
            "since": "7.2",
            "expression": "default: return X86EMUL_UNHANDLEABLE;",
            "replacement": "default: return X86EMUL_CONTINUE;",
        },
    ),
)

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
EMULATED = b"\x0f\x0bkvm"  # UD2 "kvm": what follows goes to KVM's emulator


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_emulated_rdtsc(l1: L1) -> None:
    """An intercept of L1 holds, whoever executes the instruction: the CPU or KVM."""
    if not PARAMETER.exists() or PARAMETER.read_text().strip() in ("N", "0"):
        pytest.skip("needs kvm.force_emulation_prefix=1")
    vmcs = l1.launchable(l2=EMULATED + code.RDTSC)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.RDTSC_EXITING)
    seen = l1.vmlaunch(regs={"rax": 0x1111, "rdx": 0x2222})
    assert (seen.regs["rax"], seen.regs["rdx"]) == (0x1111, 0x2222), "L2 executed RDTSC"
