"""The VMCS that programs start from."""

from __future__ import annotations

from kvmnest.fuzz.model import base_fields
from kvmnest.l1.baseline import L2Mode
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, Field, PinCtl, ProcCtl


def base_vmcs(caps: Capabilities, payload: Payload, mode: L2Mode) -> dict[Field, int]:
    """The VMCS that a program starts from: legal, and what L2 does is seen.

    That of the cases of `kvmnest fuzz` without the preemption timer, whose value is another one on
    every machine; HLT and I/O exit, since L1's host would have to go on with them.
    """
    fields = base_fields(caps, payload, mode)
    if caps.supports(PinCtl.ACTIVATE_PREEMPTION_TIMER):
        fields[Field.PIN_BASED_VM_EXEC_CONTROL] &= ~PinCtl.ACTIVATE_PREEMPTION_TIMER.value
    wanted = ProcCtl.HLT_EXITING | ProcCtl.UNCONDITIONAL_IO_EXITING
    fields[Field.CPU_BASED_VM_EXEC_CONTROL] |= wanted.value & caps.may_be_one(ProcCtl)
    return fields
