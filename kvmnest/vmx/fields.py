"""VMCS field encodings (Intel SDM appendix "Field Encoding in VMCS").

A field's encoding already holds its width, its kind and its index, so none of them is stored
a second time: they are computed from the number.
"""

from __future__ import annotations

import enum


class Width(enum.IntEnum):
    """Bits 14:13 of a field encoding: how wide the field is."""

    BITS16 = 0
    BITS64 = 1
    BITS32 = 2
    NATURAL = 3

    @property
    def bits(self) -> int:
        """Width in bits on a processor with Intel 64 (natural width is 64)."""
        return (16, 64, 32, 64)[self]

    @property
    def mask(self) -> int:
        """All bits that a field of this width can hold."""
        return (1 << self.bits) - 1


class Kind(enum.IntEnum):
    """Bits 11:10 of a field encoding: what the field is for."""

    CONTROL = 0
    EXIT_INFO = 1
    GUEST = 2
    HOST = 3


_FIELD_BITS = 0x7FFF & ~(1 << 12)
"""Bit 12 and the bits above 14 are reserved in an encoding and must be 0."""


class Field(enum.IntEnum):
    """VMCS component encodings, full access type, in the order of the SDM appendix."""

    # 16-bit control fields
    VIRTUAL_PROCESSOR_ID = 0x0000
    POSTED_INTR_NV = 0x0002
    EPTP_INDEX = 0x0004
    HLAT_PREFIX_SIZE = 0x0006
    LAST_PID_POINTER_INDEX = 0x0008
    VIRTUAL_TIMER_VECTOR = 0x000A
    # 16-bit guest-state fields
    GUEST_ES_SELECTOR = 0x0800
    GUEST_CS_SELECTOR = 0x0802
    GUEST_SS_SELECTOR = 0x0804
    GUEST_DS_SELECTOR = 0x0806
    GUEST_FS_SELECTOR = 0x0808
    GUEST_GS_SELECTOR = 0x080A
    GUEST_LDTR_SELECTOR = 0x080C
    GUEST_TR_SELECTOR = 0x080E
    GUEST_INTR_STATUS = 0x0810
    GUEST_PML_INDEX = 0x0812
    GUEST_UINV = 0x0814
    # 16-bit host-state fields
    HOST_ES_SELECTOR = 0x0C00
    HOST_CS_SELECTOR = 0x0C02
    HOST_SS_SELECTOR = 0x0C04
    HOST_DS_SELECTOR = 0x0C06
    HOST_FS_SELECTOR = 0x0C08
    HOST_GS_SELECTOR = 0x0C0A
    HOST_TR_SELECTOR = 0x0C0C
    # 64-bit control fields
    IO_BITMAP_A = 0x2000
    IO_BITMAP_B = 0x2002
    MSR_BITMAP = 0x2004
    VM_EXIT_MSR_STORE_ADDR = 0x2006
    VM_EXIT_MSR_LOAD_ADDR = 0x2008
    VM_ENTRY_MSR_LOAD_ADDR = 0x200A
    EXECUTIVE_VMCS_POINTER = 0x200C
    PML_ADDRESS = 0x200E
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_PAGE_ADDR = 0x2012
    APIC_ACCESS_ADDR = 0x2014
    POSTED_INTR_DESC_ADDR = 0x2016
    VM_FUNCTION_CONTROL = 0x2018
    EPT_POINTER = 0x201A
    EOI_EXIT_BITMAP0 = 0x201C
    EOI_EXIT_BITMAP1 = 0x201E
    EOI_EXIT_BITMAP2 = 0x2020
    EOI_EXIT_BITMAP3 = 0x2022
    EPTP_LIST_ADDRESS = 0x2024
    VMREAD_BITMAP = 0x2026
    VMWRITE_BITMAP = 0x2028
    VE_INFORMATION_ADDRESS = 0x202A
    XSS_EXIT_BITMAP = 0x202C
    ENCLS_EXITING_BITMAP = 0x202E
    SPP_TABLE_POINTER = 0x2030
    TSC_MULTIPLIER = 0x2032
    TERTIARY_VM_EXEC_CONTROL = 0x2034
    ENCLV_EXITING_BITMAP = 0x2036
    LOW_PASID_DIRECTORY_ADDRESS = 0x2038
    HIGH_PASID_DIRECTORY_ADDRESS = 0x203A
    SHARED_EPT_POINTER = 0x203C
    PCONFIG_EXITING_BITMAP = 0x203E
    HLAT_POINTER = 0x2040
    PID_POINTER_TABLE = 0x2042
    SECONDARY_VM_EXIT_CONTROLS = 0x2044
    IA32_SPEC_CTRL_MASK = 0x204A
    IA32_SPEC_CTRL_SHADOW = 0x204C
    GUEST_DEADLINE_SHADOW = 0x204E
    INJECTED_EVENT_DATA = 0x2052
    # 64-bit read-only data fields
    GUEST_PHYSICAL_ADDRESS = 0x2400
    MSR_DATA = 0x2402
    ORIGINAL_EVENT_DATA = 0x2404
    # 64-bit guest-state fields
    VMCS_LINK_POINTER = 0x2800
    GUEST_IA32_DEBUGCTL = 0x2802
    GUEST_IA32_PAT = 0x2804
    GUEST_IA32_EFER = 0x2806
    GUEST_IA32_PERF_GLOBAL_CTRL = 0x2808
    GUEST_PDPTR0 = 0x280A
    GUEST_PDPTR1 = 0x280C
    GUEST_PDPTR2 = 0x280E
    GUEST_PDPTR3 = 0x2810
    GUEST_BNDCFGS = 0x2812
    GUEST_IA32_RTIT_CTL = 0x2814
    GUEST_IA32_LBR_CTL = 0x2816
    GUEST_IA32_PKRS = 0x2818
    GUEST_IA32_FRED_CONFIG = 0x281A
    GUEST_IA32_FRED_RSP1 = 0x281C
    GUEST_IA32_FRED_RSP2 = 0x281E
    GUEST_IA32_FRED_RSP3 = 0x2820
    GUEST_IA32_FRED_STKLVLS = 0x2822
    GUEST_IA32_FRED_SSP1 = 0x2824
    GUEST_IA32_FRED_SSP2 = 0x2826
    GUEST_IA32_FRED_SSP3 = 0x2828
    GUEST_IA32_SPEC_CTRL = 0x282E
    GUEST_DEADLINE = 0x2830
    # 64-bit host-state fields
    HOST_IA32_PAT = 0x2C00
    HOST_IA32_EFER = 0x2C02
    HOST_IA32_PERF_GLOBAL_CTRL = 0x2C04
    HOST_IA32_PKRS = 0x2C06
    HOST_IA32_FRED_CONFIG = 0x2C08
    HOST_IA32_FRED_RSP1 = 0x2C0A
    HOST_IA32_FRED_RSP2 = 0x2C0C
    HOST_IA32_FRED_RSP3 = 0x2C0E
    HOST_IA32_FRED_STKLVLS = 0x2C10
    HOST_IA32_FRED_SSP1 = 0x2C12
    HOST_IA32_FRED_SSP2 = 0x2C14
    HOST_IA32_FRED_SSP3 = 0x2C16
    HOST_IA32_SPEC_CTRL = 0x2C1A
    # 32-bit control fields
    PIN_BASED_VM_EXEC_CONTROL = 0x4000
    CPU_BASED_VM_EXEC_CONTROL = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    VM_EXIT_CONTROLS = 0x400C
    VM_EXIT_MSR_STORE_COUNT = 0x400E
    VM_EXIT_MSR_LOAD_COUNT = 0x4010
    VM_ENTRY_CONTROLS = 0x4012
    VM_ENTRY_MSR_LOAD_COUNT = 0x4014
    VM_ENTRY_INTR_INFO_FIELD = 0x4016
    VM_ENTRY_EXCEPTION_ERROR_CODE = 0x4018
    VM_ENTRY_INSTRUCTION_LEN = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_VM_EXEC_CONTROL = 0x401E
    PLE_GAP = 0x4020
    PLE_WINDOW = 0x4022
    NOTIFY_WINDOW = 0x4024
    # 32-bit read-only data fields
    VM_INSTRUCTION_ERROR = 0x4400
    VM_EXIT_REASON = 0x4402
    VM_EXIT_INTR_INFO = 0x4404
    VM_EXIT_INTR_ERROR_CODE = 0x4406
    IDT_VECTORING_INFO_FIELD = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    VM_EXIT_INSTRUCTION_LEN = 0x440C
    VMX_INSTRUCTION_INFO = 0x440E
    # 32-bit guest-state fields
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_ACCESS_RIGHTS = 0x4814
    GUEST_CS_ACCESS_RIGHTS = 0x4816
    GUEST_SS_ACCESS_RIGHTS = 0x4818
    GUEST_DS_ACCESS_RIGHTS = 0x481A
    GUEST_FS_ACCESS_RIGHTS = 0x481C
    GUEST_GS_ACCESS_RIGHTS = 0x481E
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820
    GUEST_TR_ACCESS_RIGHTS = 0x4822
    GUEST_INTERRUPTIBILITY_INFO = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SMBASE = 0x4828
    GUEST_SYSENTER_CS = 0x482A
    VMX_PREEMPTION_TIMER_VALUE = 0x482E
    # 32-bit host-state field
    HOST_IA32_SYSENTER_CS = 0x4C00
    # natural-width control fields
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    CR3_TARGET_VALUE0 = 0x6008
    CR3_TARGET_VALUE1 = 0x600A
    CR3_TARGET_VALUE2 = 0x600C
    CR3_TARGET_VALUE3 = 0x600E
    # natural-width read-only data fields
    EXIT_QUALIFICATION = 0x6400
    IO_RCX = 0x6402
    IO_RSI = 0x6404
    IO_RDI = 0x6406
    IO_RIP = 0x6408
    GUEST_LINEAR_ADDRESS = 0x640A
    # natural-width guest-state fields
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DBG_EXCEPTIONS = 0x6822
    GUEST_SYSENTER_ESP = 0x6824
    GUEST_SYSENTER_EIP = 0x6826
    GUEST_S_CET = 0x6828
    GUEST_SSP = 0x682A
    GUEST_INTR_SSP_TABLE = 0x682C
    # natural-width host-state fields
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_IA32_SYSENTER_ESP = 0x6C10
    HOST_IA32_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16
    HOST_S_CET = 0x6C18
    HOST_SSP = 0x6C1A
    HOST_INTR_SSP_TABLE = 0x6C1C

    @property
    def width(self) -> Width:
        """Width of the field: 16, 64, 32 bits or natural."""
        return Width(self._value_ >> 13 & 3)

    @property
    def kind(self) -> Kind:
        """Control, read-only exit information, guest state or host state."""
        return Kind(self._value_ >> 10 & 3)

    @property
    def index(self) -> int:
        """Index inside the fields of the same width and kind (bits 9:1)."""
        return self._value_ >> 1 & 0x1FF

    @property
    def high(self) -> int:
        """Encoding of the upper 32 bits of a 64-bit field.

        Raises ValueError for a field of any other width, which has only the full access type.
        """
        if self.width is not Width.BITS64:
            raise ValueError(f"{self.name} is not a 64-bit field: it has no high access type")
        return self._value_ | 1

    @property
    def read_only(self) -> bool:
        """Exit information: VMWRITE needs IA32_VMX_MISC's permission to write it."""
        return self.kind is Kind.EXIT_INFO

    @staticmethod
    def encode(width: Width, kind: Kind, index: int, high: bool = False) -> int:
        """Build any encoding, also of a field that does not exist.

        Raises ValueError for an index beyond 9 bits.
        """
        if not 0 <= index <= 0x1FF:
            raise ValueError(f"VMCS field index {index} does not fit bits 9:1")
        return width << 13 | kind << 10 | index << 1 | high


def is_encoding(value: int) -> bool:
    """Whether the reserved bits of a VMCS component encoding (12 and 31:15) are clear."""
    return value & ~_FIELD_BITS == 0
