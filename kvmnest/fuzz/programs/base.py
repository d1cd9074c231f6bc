"""The VMCS that programs start from."""

from __future__ import annotations

from kvmnest.fuzz.model import base_fields
from kvmnest.l1.baseline import L2Mode
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, Field, PinCtl, Proc2Ctl, ProcCtl

_RANDOM = (Proc2Ctl.RDRAND_EXITING, Proc2Ctl.RDSEED_EXITING)


def base_vmcs(caps: Capabilities, payload: Payload, mode: L2Mode) -> dict[Field, int]:
    """The VMCS that a program starts from: legal, and what L2 does is seen.

    That of the cases of `kvmnest fuzz` without the preemption timer. What L1's host would have to
    go on with exits (HLT, I/O), and so does what gives another value on every machine: the TSC,
    performance counters, random numbers.
    """
    fields = base_fields(caps, payload, mode)
    if caps.supports(PinCtl.ACTIVATE_PREEMPTION_TIMER):
        fields[Field.PIN_BASED_VM_EXEC_CONTROL] &= ~PinCtl.ACTIVATE_PREEMPTION_TIMER.value
    second = sum(flag.value for flag in _RANDOM if caps.supports(flag))
    wanted = ProcCtl.HLT_EXITING | ProcCtl.UNCONDITIONAL_IO_EXITING
    wanted |= ProcCtl.RDTSC_EXITING | ProcCtl.RDPMC_EXITING
    wanted |= ProcCtl.ACTIVATE_SECONDARY_CONTROLS if second else ProcCtl(0)
    fields[Field.CPU_BASED_VM_EXEC_CONTROL] |= wanted.value & caps.may_be_one(ProcCtl)
    if second:
        fields[Field.SECONDARY_VM_EXEC_CONTROL] |= second
    return fields
