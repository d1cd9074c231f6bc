"""Basic exit reasons (Intel SDM appendix "VMX Basic Exit Reasons")."""

from __future__ import annotations

import enum

EXIT_REASON_ENTRY_FAILURE = 1 << 31
"""Set in the exit-reason field when VM entry itself failed."""
EXIT_REASON_FROM_VMX_ROOT = 1 << 29
"""Set in the exit-reason field by an SMM VM exit taken in VMX root operation."""
EXIT_REASON_PENDING_MTF = 1 << 28
"""Set in the exit-reason field when an SMM VM exit preempted a pending MTF VM exit."""
EXIT_REASON_ENCLAVE_MODE = 1 << 27
"""Set in the exit-reason field when the logical processor was in enclave mode."""
EXIT_REASON_BUS_LOCK = 1 << 26
"""Set in the exit-reason field when a bus lock was asserted and bus-lock detection is on."""
EXIT_REASON_BUSY_SHADOW_STACK = 1 << 25
"""Set in the exit-reason field when the supervisor shadow stack became prematurely busy."""


class ExitReason(enum.IntEnum):
    """Bits 15:0 of the exit-reason field."""

    EXCEPTION_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    SIPI_SIGNAL = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    INVALID_GUEST_STATE = 33
    MSR_LOAD_FAIL = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    MCE_DURING_ENTRY = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR = 46
    LDTR_TR = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIG = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PML_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SPP_EVENT = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID = 72
    ENQCMDS_PASID = 73
    BUS_LOCK = 74
    INSTRUCTION_TIMEOUT = 75
    SEAMCALL = 76
    TDCALL = 77
    RDMSRLIST = 78
    WRMSRLIST = 79
    URDMSR = 80
    UWRMSR = 81
    RDMSR_IMM = 84
    WRMSRNS_IMM = 85
