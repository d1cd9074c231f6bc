"""VM-execution, VM-exit and VM-entry controls, and the bits of the capability MSRs.

Names and bit positions follow the Intel SDM chapter "Virtual Machine Control Structures" and
the appendix "VMX Capability Reporting Facility".
"""

from __future__ import annotations

import enum


class PinCtl(enum.IntFlag):
    """Pin-based VM-execution controls."""

    EXTERNAL_INTERRUPT_EXITING = 1 << 0
    NMI_EXITING = 1 << 3
    VIRTUAL_NMIS = 1 << 5
    ACTIVATE_PREEMPTION_TIMER = 1 << 6
    PROCESS_POSTED_INTERRUPTS = 1 << 7


class ProcCtl(enum.IntFlag):
    """Primary processor-based VM-execution controls."""

    INTERRUPT_WINDOW_EXITING = 1 << 2
    USE_TSC_OFFSETTING = 1 << 3
    HLT_EXITING = 1 << 7
    INVLPG_EXITING = 1 << 9
    MWAIT_EXITING = 1 << 10
    RDPMC_EXITING = 1 << 11
    RDTSC_EXITING = 1 << 12
    CR3_LOAD_EXITING = 1 << 15
    CR3_STORE_EXITING = 1 << 16
    ACTIVATE_TERTIARY_CONTROLS = 1 << 17
    CR8_LOAD_EXITING = 1 << 19
    CR8_STORE_EXITING = 1 << 20
    USE_TPR_SHADOW = 1 << 21
    NMI_WINDOW_EXITING = 1 << 22
    MOV_DR_EXITING = 1 << 23
    UNCONDITIONAL_IO_EXITING = 1 << 24
    USE_IO_BITMAPS = 1 << 25
    MONITOR_TRAP_FLAG = 1 << 27
    USE_MSR_BITMAPS = 1 << 28
    MONITOR_EXITING = 1 << 29
    PAUSE_EXITING = 1 << 30
    ACTIVATE_SECONDARY_CONTROLS = 1 << 31


class Proc2Ctl(enum.IntFlag):
    """Secondary processor-based VM-execution controls."""

    VIRTUALIZE_APIC_ACCESSES = 1 << 0
    ENABLE_EPT = 1 << 1
    DESCRIPTOR_TABLE_EXITING = 1 << 2
    ENABLE_RDTSCP = 1 << 3
    VIRTUALIZE_X2APIC_MODE = 1 << 4
    ENABLE_VPID = 1 << 5
    WBINVD_EXITING = 1 << 6
    UNRESTRICTED_GUEST = 1 << 7
    APIC_REGISTER_VIRTUALIZATION = 1 << 8
    VIRTUAL_INTERRUPT_DELIVERY = 1 << 9
    PAUSE_LOOP_EXITING = 1 << 10
    RDRAND_EXITING = 1 << 11
    ENABLE_INVPCID = 1 << 12
    ENABLE_VM_FUNCTIONS = 1 << 13
    VMCS_SHADOWING = 1 << 14
    ENABLE_ENCLS_EXITING = 1 << 15
    RDSEED_EXITING = 1 << 16
    ENABLE_PML = 1 << 17
    EPT_VIOLATION_VE = 1 << 18
    CONCEAL_VMX_FROM_PT = 1 << 19
    ENABLE_XSAVES = 1 << 20
    PASID_TRANSLATION = 1 << 21
    MODE_BASED_EXECUTE = 1 << 22
    SUB_PAGE_WRITE_PERMISSIONS = 1 << 23
    PT_USES_GUEST_PHYSICAL = 1 << 24
    USE_TSC_SCALING = 1 << 25
    ENABLE_USER_WAIT_AND_PAUSE = 1 << 26
    ENABLE_PCONFIG = 1 << 27
    ENABLE_ENCLV_EXITING = 1 << 28
    BUS_LOCK_DETECTION = 1 << 30
    INSTRUCTION_TIMEOUT = 1 << 31


class Proc3Ctl(enum.IntFlag):
    """Tertiary processor-based VM-execution controls (a 64-bit field)."""

    LOADIWKEY_EXITING = 1 << 0
    ENABLE_HLAT = 1 << 1
    EPT_PAGING_WRITE = 1 << 2
    GUEST_PAGING_VERIFICATION = 1 << 3
    IPI_VIRTUALIZATION = 1 << 4
    ENABLE_MSR_LIST_INSTRUCTIONS = 1 << 6
    VIRTUALIZE_SPEC_CTRL = 1 << 7
    APIC_TIMER_VIRTUALIZATION = 1 << 8


class ExitCtl(enum.IntFlag):
    """Primary VM-exit controls."""

    SAVE_DEBUG_CONTROLS = 1 << 2
    HOST_ADDRESS_SPACE_SIZE = 1 << 9
    LOAD_PERF_GLOBAL_CTRL = 1 << 12
    ACKNOWLEDGE_INTERRUPT_ON_EXIT = 1 << 15
    SAVE_PAT = 1 << 18
    LOAD_PAT = 1 << 19
    SAVE_EFER = 1 << 20
    LOAD_EFER = 1 << 21
    SAVE_PREEMPTION_TIMER = 1 << 22
    CLEAR_BNDCFGS = 1 << 23
    CONCEAL_VMX_FROM_PT = 1 << 24
    CLEAR_RTIT_CTL = 1 << 25
    CLEAR_LBR_CTL = 1 << 26
    CLEAR_UINV = 1 << 27
    LOAD_CET_STATE = 1 << 28
    LOAD_PKRS = 1 << 29
    SAVE_PERF_GLOBAL_CTRL = 1 << 30
    ACTIVATE_SECONDARY_CONTROLS = 1 << 31


class Exit2Ctl(enum.IntFlag):
    """Secondary VM-exit controls (a 64-bit field)."""

    SAVE_FRED = 1 << 0
    LOAD_FRED = 1 << 1
    LOAD_SPEC_CTRL = 1 << 2
    PREMATURELY_BUSY_SHADOW_STACK = 1 << 3


class EntryCtl(enum.IntFlag):
    """VM-entry controls."""

    LOAD_DEBUG_CONTROLS = 1 << 2
    IA32E_MODE_GUEST = 1 << 9
    ENTRY_TO_SMM = 1 << 10
    DEACTIVATE_DUAL_MONITOR = 1 << 11
    LOAD_PERF_GLOBAL_CTRL = 1 << 13
    LOAD_PAT = 1 << 14
    LOAD_EFER = 1 << 15
    LOAD_BNDCFGS = 1 << 16
    CONCEAL_VMX_FROM_PT = 1 << 17
    LOAD_RTIT_CTL = 1 << 18
    LOAD_UINV = 1 << 19
    LOAD_CET_STATE = 1 << 20
    LOAD_LBR_CTL = 1 << 21
    LOAD_PKRS = 1 << 22
    LOAD_FRED = 1 << 23
    LOAD_SPEC_CTRL = 1 << 24


class VmFunc(enum.IntFlag):
    """VM-function controls and IA32_VMX_VMFUNC."""

    EPTP_SWITCHING = 1 << 0


class BasicCap(enum.IntFlag):
    """Single-bit features of IA32_VMX_BASIC."""

    PHYSICAL_32BIT = 1 << 48
    DUAL_MONITOR = 1 << 49
    INS_OUTS_INFO = 1 << 54
    TRUE_CONTROLS = 1 << 55
    ERROR_CODE_OPTIONAL = 1 << 56
    NESTED_EXCEPTION = 1 << 58


class Misc(enum.IntFlag):
    """Single-bit features of IA32_VMX_MISC."""

    SAVE_EFER_LMA = 1 << 5
    ACTIVITY_HLT = 1 << 6
    ACTIVITY_SHUTDOWN = 1 << 7
    ACTIVITY_WAIT_FOR_SIPI = 1 << 8
    PT_IN_VMX = 1 << 14
    RDMSR_SMBASE_IN_SMM = 1 << 15
    SMI_UNBLOCK_BY_VMXOFF = 1 << 28
    VMWRITE_ANY_FIELD = 1 << 29
    ZERO_LENGTH_INJECTION = 1 << 30


class EptVpidCap(enum.IntFlag):
    """Single-bit features of IA32_VMX_EPT_VPID_CAP."""

    EXECUTE_ONLY = 1 << 0
    PAGE_WALK_4 = 1 << 6
    PAGE_WALK_5 = 1 << 7
    MEMORY_TYPE_UC = 1 << 8
    MEMORY_TYPE_WB = 1 << 14
    PAGE_2MB = 1 << 16
    PAGE_1GB = 1 << 17
    INVEPT = 1 << 20
    ACCESSED_DIRTY = 1 << 21
    ADVANCED_EXIT_INFO = 1 << 22
    SUPERVISOR_SHADOW_STACK = 1 << 23
    INVEPT_SINGLE_CONTEXT = 1 << 25
    INVEPT_ALL_CONTEXTS = 1 << 26
    INVVPID = 1 << 32
    INVVPID_INDIVIDUAL_ADDRESS = 1 << 40
    INVVPID_SINGLE_CONTEXT = 1 << 41
    INVVPID_ALL_CONTEXTS = 1 << 42
    INVVPID_SINGLE_CONTEXT_RETAINING_GLOBALS = 1 << 43
