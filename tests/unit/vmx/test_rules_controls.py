"""Rules about control fields: every row breaks exactly the rule it names."""

import pytest
from vmx_example import baseline, capabilities

from kvmnest.vmx import (
    CpuFeatures,
    EntryCtl,
    ExitCtl,
    Field,
    IntrType,
    Misc,
    Msr,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.rules import Stage, check

F = Field
PIN, PROC, PROC2 = (
    F.PIN_BASED_VM_EXEC_CONTROL,
    F.CPU_BASED_VM_EXEC_CONTROL,
    F.SECONDARY_VM_EXEC_CONTROL,
)
EXIT, ENTRY, INFO = F.VM_EXIT_CONTROLS, F.VM_ENTRY_CONTROLS, F.VM_ENTRY_INTR_INFO_FIELD
EPTP = 0x5000 | 3 << 3 | 6
EPT = {PROC2: Proc2Ctl.ENABLE_EPT, F.EPT_POINTER: EPTP}
VID = Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY
GP = intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, error_code=True)
SOFT = intr_info(0x80, IntrType.SOFTWARE_INTERRUPT)
WIDE = 1 << 46

CAPS = capabilities(cpu=CpuFeatures(physical_bits=46))

# Values are ORed into the baseline's.
ROWS: list[tuple[dict[Field, int], str]] = [
    ({PIN: 1 << 8}, "IA32_VMX_TRUE_PINBASED_CTLS requires 0 for 0x100"),
    (
        {PROC: ProcCtl.ACTIVATE_TERTIARY_CONTROLS},
        "IA32_VMX_TRUE_PROCBASED_CTLS requires 0 for ACTIVATE_TERTIARY_CONTROLS",
    ),
    ({PROC2: 1 << 27}, "IA32_VMX_PROCBASED_CTLS2 requires 0 for ENABLE_PCONFIG"),
    ({EXIT: 1 << 31}, "IA32_VMX_TRUE_EXIT_CTLS requires 0 for ACTIVATE_SECONDARY_CONTROLS"),
    ({ENTRY: EntryCtl.LOAD_PKRS}, "IA32_VMX_TRUE_ENTRY_CTLS requires 0 for LOAD_PKRS"),
    ({F.CR3_TARGET_COUNT: 5}, "the CR3-target count must not exceed 4"),
    (
        {PROC: ProcCtl.USE_IO_BITMAPS, F.IO_BITMAP_B: 0x800},
        "the address of I/O bitmap B must be aligned to 4096 bytes",
    ),
    (
        {PROC: ProcCtl.USE_IO_BITMAPS, F.IO_BITMAP_A: WIDE},
        "the address of I/O bitmap A must not exceed the physical-address width",
    ),
    (
        {PROC: ProcCtl.USE_MSR_BITMAPS, F.MSR_BITMAP: 1},
        "the MSR-bitmap address must be aligned to 4096 bytes",
    ),
    (
        {PROC: ProcCtl.USE_TPR_SHADOW, F.VIRTUAL_APIC_PAGE_ADDR: 0x10},
        "the virtual-APIC address must be aligned to 4096 bytes",
    ),
    (
        {PROC: ProcCtl.USE_TPR_SHADOW, F.TPR_THRESHOLD: 0x10},
        "bits 31:4 of the TPR threshold must be 0",
    ),
    (
        {PROC2: Proc2Ctl.VIRTUALIZE_X2APIC_MODE},
        "VIRTUALIZE_X2APIC_MODE needs USE_TPR_SHADOW",
    ),
    (
        {PROC2: Proc2Ctl.APIC_REGISTER_VIRTUALIZATION},
        "APIC_REGISTER_VIRTUALIZATION needs USE_TPR_SHADOW",
    ),
    (
        {PROC2: VID, PIN: PinCtl.EXTERNAL_INTERRUPT_EXITING},
        "VIRTUAL_INTERRUPT_DELIVERY needs USE_TPR_SHADOW",
    ),
    ({PIN: PinCtl.VIRTUAL_NMIS}, "VIRTUAL_NMIS needs NMI_EXITING"),
    ({PROC: ProcCtl.NMI_WINDOW_EXITING}, "NMI_WINDOW_EXITING needs VIRTUAL_NMIS"),
    (
        {PROC2: Proc2Ctl.VIRTUALIZE_APIC_ACCESSES, F.APIC_ACCESS_ADDR: 8},
        "the APIC-access address must be aligned to 4096 bytes",
    ),
    (
        {
            PROC: ProcCtl.USE_TPR_SHADOW,
            PROC2: Proc2Ctl.VIRTUALIZE_APIC_ACCESSES | Proc2Ctl.VIRTUALIZE_X2APIC_MODE,
        },
        "VIRTUALIZE_X2APIC_MODE and VIRTUALIZE_APIC_ACCESSES exclude each other",
    ),
    (
        {PROC: ProcCtl.USE_TPR_SHADOW, PROC2: VID},
        "VIRTUAL_INTERRUPT_DELIVERY needs EXTERNAL_INTERRUPT_EXITING",
    ),
    ({PROC2: Proc2Ctl.ENABLE_VPID}, "the VPID must not be 0 when VPIDs are enabled"),
    ({**EPT, F.EPT_POINTER: EPTP | 7}, "EPTP: memory type 7 is not supported"),
    ({**EPT, F.EPT_POINTER: EPTP & ~6 | 1}, "EPTP: memory type 1 is not supported"),
    ({**EPT, F.EPT_POINTER: 0x5006 | 2 << 3}, "EPTP: page-walk length 3 is not supported"),
    ({**EPT, F.EPT_POINTER: 0x5006 | 4 << 3}, "EPTP: page-walk length 5 is not supported"),
    (
        {**EPT, F.EPT_POINTER: EPTP | 1 << 7},
        "EPTP: supervisor shadow-stack control is not supported",
    ),
    ({**EPT, F.EPT_POINTER: EPTP | 1 << 9}, "EPTP: bits 11:8 must be 0"),
    ({**EPT, F.EPT_POINTER: EPTP | WIDE}, "EPTP: the address must not exceed the physical width"),
    ({PROC2: Proc2Ctl.UNRESTRICTED_GUEST}, "UNRESTRICTED_GUEST needs ENABLE_EPT"),
    ({PROC2: Proc2Ctl.ENABLE_PML}, "ENABLE_PML needs ENABLE_EPT"),
    (
        {**EPT, PROC2: Proc2Ctl.ENABLE_EPT | Proc2Ctl.ENABLE_PML, F.PML_ADDRESS: 0x10},
        "the PML address must be aligned to 4096 bytes",
    ),
    (
        {PROC2: Proc2Ctl.ENABLE_VM_FUNCTIONS, F.VM_FUNCTION_CONTROL: 2},
        "IA32_VMX_VMFUNC requires 0 for VM functions 0x2",
    ),
    (
        {PROC2: Proc2Ctl.ENABLE_VM_FUNCTIONS, F.VM_FUNCTION_CONTROL: 1},
        "EPTP switching needs ENABLE_EPT",
    ),
    (
        {PROC2: Proc2Ctl.VMCS_SHADOWING, F.VMREAD_BITMAP: 0x20},
        "the VMREAD-bitmap address must be aligned to 4096 bytes",
    ),
    (
        {PROC2: Proc2Ctl.VMCS_SHADOWING, F.VMWRITE_BITMAP: WIDE},
        "the VMWRITE-bitmap address must not exceed the physical-address width",
    ),
    ({PROC2: Proc2Ctl.USE_TSC_SCALING}, "the TSC multiplier must not be 0"),
    (
        {EXIT: ExitCtl.SAVE_PREEMPTION_TIMER},
        "SAVE_PREEMPTION_TIMER needs ACTIVATE_PREEMPTION_TIMER",
    ),
    (
        {F.VM_EXIT_MSR_STORE_COUNT: 1, F.VM_EXIT_MSR_STORE_ADDR: 8},
        "the VM-exit MSR-store area must be aligned to 16 bytes",
    ),
    (
        {F.VM_EXIT_MSR_LOAD_COUNT: 2, F.VM_EXIT_MSR_LOAD_ADDR: WIDE - 16},
        "the last byte of the VM-exit MSR-load area must not exceed the physical-address width",
    ),
    (
        {F.VM_ENTRY_MSR_LOAD_COUNT: 1, F.VM_ENTRY_MSR_LOAD_ADDR: WIDE},
        "the VM-entry MSR-load area must not exceed the physical-address width",
    ),
    ({INFO: intr_info(0x20, 1)}, "interruption type 1 is reserved"),
    ({INFO: intr_info(3, IntrType.NMI)}, "an NMI must have vector 2"),
    (
        {INFO: intr_info(32, IntrType.HARDWARE_EXCEPTION)},
        "a hardware exception must have a vector of at most 31",
    ),
    (
        {INFO: intr_info(1, IntrType.OTHER_EVENT)},
        "type 7 (other event) needs vector 0 (pending MTF)",
    ),
    (
        {INFO: SOFT | 1 << 11, F.VM_ENTRY_INSTRUCTION_LEN: 2},
        "only a hardware exception delivers an error code",
    ),
    (
        {INFO: intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION, error_code=True)},
        "vector 6 has no error code",
    ),
    (
        {INFO: intr_info(Vector.PF, IntrType.HARDWARE_EXCEPTION)},
        "vector 14 needs the deliver-error-code bit",
    ),
    (
        {INFO: GP, F.VM_ENTRY_EXCEPTION_ERROR_CODE: 0x10000},
        "bits 31:16 of the error code must be 0",
    ),
    ({INFO: GP | 1 << 12}, "bits 30:12 of the interruption information must be 0"),
    (
        {INFO: SOFT, F.VM_ENTRY_INSTRUCTION_LEN: 16},
        "the instruction length of a software event must be 0 to 15",
    ),
]


@pytest.mark.parametrize(("change", "text"), ROWS, ids=[text for _, text in ROWS])
def test_one_control_rule(change: dict[Field, int], text: str) -> None:
    vmcs = baseline(CAPS)
    for field, value in change.items():
        vmcs[field] = vmcs.get(field, 0) | int(value)
    found = check(vmcs, CAPS)
    assert [violation.text for violation in found] == [text]
    assert found[0].stage is Stage.CONTROL
    assert set(found[0].fields) & set(change)


@pytest.mark.parametrize(
    "change",
    [
        {PROC: ProcCtl.USE_MSR_BITMAPS, F.MSR_BITMAP: 0x7000},
        EPT,
        {PROC2: Proc2Ctl.ENABLE_EPT, F.EPT_POINTER: EPTP | 1 << 6},
        {**EPT, PROC2: Proc2Ctl.ENABLE_EPT | Proc2Ctl.UNRESTRICTED_GUEST},
        {PIN: PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS, PROC: ProcCtl.NMI_WINDOW_EXITING},
        {INFO: GP},
        {INFO: SOFT},
        {INFO: intr_info(0, IntrType.OTHER_EVENT)},
        {INFO: intr_info(0x20, 1, valid=False)},
        {F.VM_EXIT_MSR_LOAD_ADDR: 7},
        {F.MSR_BITMAP: 7, F.EPT_POINTER: 7, F.VIRTUAL_APIC_PAGE_ADDR: 7},
        {
            PIN: PinCtl.PROCESS_POSTED_INTERRUPTS | PinCtl.EXTERNAL_INTERRUPT_EXITING,
            PROC: ProcCtl.USE_TPR_SHADOW,
            PROC2: VID,
            EXIT: ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
            F.POSTED_INTR_NV: 0xFF,
            F.POSTED_INTR_DESC_ADDR: 0x40,
            F.TPR_THRESHOLD: 0xFF,
        },
    ],
)
def test_accepted(change: dict[Field, int]) -> None:
    vmcs = baseline(CAPS)
    for field, value in change.items():
        vmcs[field] = vmcs.get(field, 0) | int(value)
    assert check(vmcs, CAPS) == []


def test_must_be_one_bits() -> None:
    vmcs = baseline(CAPS) | {PIN: 0x14}
    assert [v.text for v in check(vmcs, CAPS)] == ["IA32_VMX_TRUE_PINBASED_CTLS requires 1 for 0x2"]


def test_inactive_secondary_controls_count_as_zero() -> None:
    vmcs = baseline(CAPS)
    vmcs[PROC] &= ~ProcCtl.ACTIVATE_SECONDARY_CONTROLS.value
    vmcs[PROC2] = 0xFFFFFFFF
    assert check(vmcs, CAPS) == []


def test_posted_interrupts_need_much() -> None:
    vmcs = baseline(CAPS) | {F.POSTED_INTR_NV: 0x100, F.POSTED_INTR_DESC_ADDR: 0x20}
    vmcs[PIN] |= PinCtl.PROCESS_POSTED_INTERRUPTS.value
    assert [v.text for v in check(vmcs, CAPS)] == [
        "PROCESS_POSTED_INTERRUPTS needs VIRTUAL_INTERRUPT_DELIVERY",
        "PROCESS_POSTED_INTERRUPTS needs ACKNOWLEDGE_INTERRUPT_ON_EXIT",
        "the posted-interrupt notification vector must be at most 255",
        "the address of the posted-interrupt descriptor must be aligned to 64 bytes",
    ]


def test_software_length_zero_needs_the_capability() -> None:
    old = capabilities(clear={Msr.IA32_VMX_MISC: Misc.ZERO_LENGTH_INJECTION})
    vmcs = baseline(old) | {INFO: SOFT}
    assert [v.text for v in check(vmcs, old)] == [
        "the instruction length of a software event must be 1 to 15"
    ]


def test_error_code_is_free_with_the_capability() -> None:
    caps = capabilities(set={Msr.IA32_VMX_BASIC: 1 << 56})
    for vector, deliver in ((Vector.UD, True), (Vector.PF, False)):
        event = intr_info(vector, IntrType.HARDWARE_EXCEPTION, error_code=deliver)
        assert check(baseline(caps) | {INFO: event}, caps) == []


def test_physical_32bit() -> None:
    caps = capabilities(set={Msr.IA32_VMX_BASIC: 1 << 48})
    vmcs = baseline(caps) | {F.MSR_BITMAP: 1 << 32}
    vmcs[PROC] |= ProcCtl.USE_MSR_BITMAPS.value
    assert len(check(vmcs, caps)) == 1


def test_tpr_threshold_against_vtpr() -> None:
    vmcs = baseline(CAPS) | {F.VIRTUAL_APIC_PAGE_ADDR: 0x9000, F.TPR_THRESHOLD: 5}
    vmcs[PROC] |= ProcCtl.USE_TPR_SHADOW.value
    asked = []

    def memory(vtpr: int, gpa: int, size: int) -> bytes:
        asked.append((gpa, size))
        return bytes([vtpr])

    assert check(vmcs, CAPS, lambda gpa, size: memory(0x50, gpa, size)) == []
    assert [v.text for v in check(vmcs, CAPS, lambda gpa, size: memory(0x4F, gpa, size))] == [
        "the TPR threshold must not exceed bits 7:4 of VTPR"
    ]
    assert set(asked) == {(0x9080, 1)}
