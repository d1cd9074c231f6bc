"""The VMX architecture as data: pure, without any I/O (Intel SDM names and numbers).

What only messages and a few cases need (exit-information decoders, explanations) is imported
on first use: the package also runs in an emulated CPU, where each class costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvmnest.vmx.capinfo import BasicInfo, CpuFeatures, MiscInfo
from kvmnest.vmx.caps import Capabilities
from kvmnest.vmx.controls import (
    BasicCap,
    EntryCtl,
    EptVpidCap,
    Exit2Ctl,
    ExitCtl,
    Misc,
    PinCtl,
    Proc2Ctl,
    Proc3Ctl,
    ProcCtl,
    VmFunc,
)
from kvmnest.vmx.errors import VmxError
from kvmnest.vmx.fields import Field, Kind, Width, is_encoding
from kvmnest.vmx.msrs import Msr
from kvmnest.vmx.reasons import (
    EXIT_REASON_BUS_LOCK,
    EXIT_REASON_BUSY_SHADOW_STACK,
    EXIT_REASON_ENCLAVE_MODE,
    EXIT_REASON_ENTRY_FAILURE,
    EXIT_REASON_FROM_VMX_ROOT,
    EXIT_REASON_PENDING_MTF,
    ExitReason,
)
from kvmnest.vmx.registers import (
    ERROR_CODE_VECTORS,
    INTR_INFO_ERROR_CODE,
    INTR_INFO_NMI_UNBLOCKING,
    INTR_INFO_VALID,
    AccessRights,
    ActivityState,
    Cr0,
    Cr4,
    DebugCtl,
    Dr6,
    Dr7,
    Efer,
    FeatureControl,
    Interruptibility,
    IntrType,
    PendingDebug,
    PfErr,
    Rflags,
    Vector,
    intr_info,
)

if TYPE_CHECKING:
    from kvmnest.vmx.exitinfo import (
        ApicAccess,
        ApicAccessType,
        CrAccess,
        CrAccessType,
        DescriptorTableOp,
        DrAccess,
        EptQualification,
        InstructionInfo,
        IntrInfo,
        IoQualification,
        SystemSegmentOp,
        TaskSwitch,
        TaskSwitchSource,
    )
    from kvmnest.vmx.explain import (
        explain_error,
        explain_exit,
        explain_field_value,
        explain_instruction,
        explain_intr_info,
        explain_msr,
        explain_qualification,
        explain_reason,
        flag_names,
    )

__all__ = [
    "ERROR_CODE_VECTORS",
    "EXIT_REASON_BUSY_SHADOW_STACK",
    "EXIT_REASON_BUS_LOCK",
    "EXIT_REASON_ENCLAVE_MODE",
    "EXIT_REASON_ENTRY_FAILURE",
    "EXIT_REASON_FROM_VMX_ROOT",
    "EXIT_REASON_PENDING_MTF",
    "INTR_INFO_ERROR_CODE",
    "INTR_INFO_NMI_UNBLOCKING",
    "INTR_INFO_VALID",
    "AccessRights",
    "ActivityState",
    "ApicAccess",
    "ApicAccessType",
    "BasicCap",
    "BasicInfo",
    "Capabilities",
    "CpuFeatures",
    "Cr0",
    "Cr4",
    "CrAccess",
    "CrAccessType",
    "DebugCtl",
    "DescriptorTableOp",
    "Dr6",
    "Dr7",
    "DrAccess",
    "Efer",
    "EntryCtl",
    "EptQualification",
    "EptVpidCap",
    "Exit2Ctl",
    "ExitCtl",
    "ExitReason",
    "FeatureControl",
    "Field",
    "InstructionInfo",
    "Interruptibility",
    "IntrInfo",
    "IntrType",
    "IoQualification",
    "Kind",
    "Misc",
    "MiscInfo",
    "Msr",
    "PendingDebug",
    "PfErr",
    "PinCtl",
    "Proc2Ctl",
    "Proc3Ctl",
    "ProcCtl",
    "Rflags",
    "SystemSegmentOp",
    "TaskSwitch",
    "TaskSwitchSource",
    "Vector",
    "VmFunc",
    "VmxError",
    "Width",
    "explain_error",
    "explain_exit",
    "explain_field_value",
    "explain_instruction",
    "explain_intr_info",
    "explain_msr",
    "explain_qualification",
    "explain_reason",
    "flag_names",
    "intr_info",
    "is_encoding",
]

_EXIT_INFO = frozenset(
    {
        "ApicAccess",
        "ApicAccessType",
        "CrAccess",
        "CrAccessType",
        "DescriptorTableOp",
        "DrAccess",
        "EptQualification",
        "InstructionInfo",
        "IntrInfo",
        "IoQualification",
        "SystemSegmentOp",
        "TaskSwitch",
        "TaskSwitchSource",
    }
)


def __getattr__(name: str) -> Any:
    """Import the rarely used modules when one of their names is asked for (PEP 562)."""
    if name in _EXIT_INFO:
        return getattr(import_module("kvmnest.vmx.exitinfo"), name)
    if name in __all__:
        return getattr(import_module("kvmnest.vmx.explain"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
