"""Exit-information decoders and their texts."""

import pytest

from kvmnest.vmx import (
    ApicAccess,
    ApicAccessType,
    CrAccess,
    CrAccessType,
    DrAccess,
    EptQualification,
    ExitReason,
    Field,
    InstructionInfo,
    IntrInfo,
    IntrType,
    IoQualification,
    TaskSwitch,
    TaskSwitchSource,
    Vector,
    explain_error,
    explain_exit,
    explain_field_value,
    explain_msr,
    intr_info,
)

ROUND_TRIPS = [
    (CrAccess(cr=4, type=CrAccessType.MOV_FROM_CR, register=9), 0x914),
    (CrAccess(cr=0, type=CrAccessType.LMSW, lmsw_source=0xFFF1, lmsw_memory=True), 0xFFF10070),
    (DrAccess(dr=7, read=True, register=3), 0x317),
    (IoQualification(size=4, input=False, port=0x3F8, string=True, rep=True), 0x3F80033),
    (IoQualification(size=1, input=True, port=0x80, immediate=True), 0x800048),
    (EptQualification(write=True, readable=True, linear_valid=True, translated=True), 0x18A),
    (EptQualification(fetch=True, nmi_unblocking=True, asynchronous=True), 0x11004),
    (ApicAccess(offset=0x300, type=ApicAccessType.LINEAR_WRITE), 0x1300),
    (ApicAccess(offset=0, type=7), 0x7000),
    (TaskSwitch(selector=0x28, source=TaskSwitchSource.TASK_GATE), 0xC0000028),
    (IntrInfo(14, IntrType.HARDWARE_EXCEPTION, error_code=True), 0x80000B0E),
    (IntrInfo(9, 1, valid=False), 0x109),
]


@pytest.mark.parametrize(("value", "number"), ROUND_TRIPS)
def test_round_trip(value: object, number: int) -> None:
    kind = type(value)
    assert kind.decode(number) == value  # type: ignore[attr-defined]
    assert value.encode() == number  # type: ignore[attr-defined]


def test_instruction_info_memory_operand() -> None:
    # vmwrite [rbx+rcx*8], rdx under a 64-bit address size: reg2 holds the encoding
    info = InstructionInfo(scale=3, segment=3, index=1, base=3, reg2=2)
    assert InstructionInfo.decode(info.encode()) == info
    assert info.operand() == "ds:[rbx+rcx*8]"
    assert info.encode() == 3 | 2 << 7 | 3 << 15 | 1 << 18 | 3 << 23 | 2 << 28


def test_instruction_info_register_operand() -> None:
    info = InstructionInfo(register=True, reg1=10, segment=0)
    assert info.operand() == "r10"
    assert InstructionInfo.decode(info.encode()).index is None


def test_instruction_info_bad_address_size() -> None:
    with pytest.raises(ValueError, match="address size 3"):
        InstructionInfo.decode(3 << 7)


@pytest.mark.parametrize(
    ("reason", "qualification", "text"),
    [
        (ExitReason.CR_ACCESS, 0x304, "CR_ACCESS (28); MOV rbx to CR4"),
        (ExitReason.CR_ACCESS, 0x20, "CR_ACCESS (28); CLTS"),
        (
            ExitReason.IO_INSTRUCTION,
            0x800048,
            "IO_INSTRUCTION (30); IN of 1 byte(s), port 0x80 (immediate)",
        ),
        (
            ExitReason.EPT_VIOLATION,
            0x18A,
            "EPT_VIOLATION (48); write, EPT permission r--, linear address valid "
            "(final translation)",
        ),
        (
            0x80000021,
            4,
            "INVALID_GUEST_STATE (33), VM entry failed; the VMCS link pointer",
        ),
        (
            0x80000022,
            3,
            "MSR_LOAD_FAIL (34), VM entry failed; entry 3 of the VM-entry MSR-load area",
        ),
        (35, 0, "undefined exit reason 35"),
        (
            ExitReason.TASK_SWITCH,
            0xC0000028,
            "TASK_SWITCH (9); TASK_GATE to TSS selector 0x28",
        ),
    ],
)
def test_explain_exit(reason: int, qualification: int, text: str) -> None:
    assert explain_exit(reason, qualification) == text


def test_explain_exception() -> None:
    info = intr_info(Vector.PF, IntrType.HARDWARE_EXCEPTION, error_code=True)
    assert explain_exit(ExitReason.EXCEPTION_NMI, 0x1000, info) == (
        "EXCEPTION_NMI (0); hardware exception #PF with error code; address 0x1000"
    )
    nested = explain_exit(ExitReason.EPT_VIOLATION, 1, idt_vectoring=info)
    assert nested.endswith("while delivering hardware exception #PF with error code")


def test_explain_instruction() -> None:
    info = InstructionInfo(segment=3, base=0, reg2=1).encode()
    assert explain_exit(ExitReason.GDTR_IDTR, 0, instruction_info=info) == (
        "GDTR_IDTR (46); SIDT ds:[rax]"
    )


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        (Field.GUEST_RFLAGS, 0x20002, "0x20002 (RESERVED1|VM)"),
        (Field.GUEST_CS_ACCESS_RIGHTS, 0xA09B, "0xa09b (type=0xb s=1 dpl=0 p=1 l=1 g=1)"),
        (Field.GUEST_ACTIVITY_STATE, 3, "0x3 (WAIT_FOR_SIPI)"),
        (Field.GUEST_ACTIVITY_STATE, 9, "0x9"),
        (Field.EXCEPTION_BITMAP, 1 << 14 | 1 << 6, "0x4040 (UD|PF)"),
        (Field.PIN_BASED_VM_EXEC_CONTROL, 0x17, "0x17 (EXTERNAL_INTERRUPT_EXITING|0x16)"),
        (Field.GUEST_RIP, 0x20000, "0x20000"),
        (Field.VM_INSTRUCTION_ERROR, 5, "5: VMRESUME of a VMCS that was not launched"),
    ],
)
def test_explain_field_value(field: Field, value: int, text: str) -> None:
    assert explain_field_value(field, value) == text


def test_explain_unknown() -> None:
    assert explain_error(14) == "14: not a defined VM-instruction error"
    assert explain_msr(0xC0000080) == "IA32_EFER"
    assert explain_msr(0x12345) == "MSR 0x12345"
