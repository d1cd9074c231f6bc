"""The VMCS field that holds each kind of controls."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from kvmnest.vmx.controls import EntryCtl, Exit2Ctl, ExitCtl, PinCtl, Proc2Ctl, Proc3Ctl, ProcCtl
from kvmnest.vmx.fields import Field

FIELD_OF: Mapping[type[enum.IntFlag], Field] = {
    PinCtl: Field.PIN_BASED_VM_EXEC_CONTROL,
    ProcCtl: Field.CPU_BASED_VM_EXEC_CONTROL,
    Proc2Ctl: Field.SECONDARY_VM_EXEC_CONTROL,
    Proc3Ctl: Field.TERTIARY_VM_EXEC_CONTROL,
    ExitCtl: Field.VM_EXIT_CONTROLS,
    Exit2Ctl: Field.SECONDARY_VM_EXIT_CONTROLS,
    EntryCtl: Field.VM_ENTRY_CONTROLS,
}
