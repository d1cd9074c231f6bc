"""VM-instruction error numbers (Intel SDM "VM Instruction Error Numbers")."""

from __future__ import annotations

import enum


class VmxError(enum.IntEnum):
    """Values of the VM-instruction error field after VMfailValid."""

    VMCALL_IN_ROOT = 1
    VMCLEAR_INVALID_ADDRESS = 2
    VMCLEAR_VMXON_POINTER = 3
    VMLAUNCH_NONCLEAR_VMCS = 4
    VMRESUME_NONLAUNCHED_VMCS = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_INVALID_CONTROL_FIELD = 7
    ENTRY_INVALID_HOST_STATE_FIELD = 8
    VMPTRLD_INVALID_ADDRESS = 9
    VMPTRLD_VMXON_POINTER = 10
    VMPTRLD_INCORRECT_REVISION_ID = 11
    UNSUPPORTED_VMCS_COMPONENT = 12
    VMWRITE_READ_ONLY_COMPONENT = 13
    VMXON_IN_ROOT = 15
    ENTRY_INVALID_EXECUTIVE_VMCS_POINTER = 16
    ENTRY_NONLAUNCHED_EXECUTIVE_VMCS = 17
    ENTRY_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER = 18
    VMCALL_NONCLEAR_VMCS = 19
    VMCALL_INVALID_VM_EXIT_CONTROL_FIELDS = 20
    VMCALL_INCORRECT_MSEG_REVISION_ID = 22
    VMXOFF_UNDER_DUAL_MONITOR = 23
    VMCALL_INVALID_SMM_MONITOR_FEATURES = 24
    ENTRY_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS = 25
    ENTRY_EVENTS_BLOCKED_BY_MOV_SS = 26
    INVALID_OPERAND_TO_INVEPT_INVVPID = 28

    @property
    def text(self) -> str:
        """What went wrong, in our own words."""
        return _TEXT[self._value_]


_TEXT = {
    1: "VMCALL in VMX root operation",
    2: "VMCLEAR of an address that is not a valid VMCS address",
    3: "VMCLEAR of the VMXON region",
    4: "VMLAUNCH of a VMCS whose launch state is not clear",
    5: "VMRESUME of a VMCS that was not launched",
    6: "VMRESUME of a VMCS that was current when VMXOFF ran",
    7: "VM entry with invalid control fields",
    8: "VM entry with invalid host-state fields",
    9: "VMPTRLD of an address that is not a valid VMCS address",
    10: "VMPTRLD of the VMXON region",
    11: "VMPTRLD of a region with a wrong revision identifier or shadow indicator",
    12: "VMREAD or VMWRITE of a field that does not exist",
    13: "VMWRITE to a read-only field",
    15: "VMXON while already in VMX root operation",
    16: "VM entry with an invalid executive-VMCS pointer",
    17: "VM entry with an executive VMCS that was not launched",
    18: "VM entry whose executive-VMCS pointer is not the VMXON pointer",
    19: "VMCALL to activate dual-monitor treatment with a VMCS that is not clear",
    20: "VMCALL to activate dual-monitor treatment with invalid VM-exit controls",
    22: "VMCALL with a wrong MSEG revision identifier",
    23: "VMXOFF while dual-monitor treatment is active",
    24: "VMCALL with invalid SMM-monitor features",
    25: "VM entry that returns from SMM: invalid execution controls in the executive VMCS",
    26: "VM entry while events are blocked by MOV SS",
    28: "invalid operand of INVEPT or INVVPID",
}
