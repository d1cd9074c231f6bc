"""Numbers of the architecture: VMCS fields, exit reasons, errors."""

import re
from pathlib import Path

import pytest

from kvmnest.vmx import ExitReason, Field, Kind, VmxError, Width, is_encoding

UAPI_VMX = [
    Path("/usr/include/x86_64-linux-gnu/asm/vmx.h"),
    Path("/usr/include/asm/vmx.h"),
]

# The kernel's uapi names that differ from ours.
UAPI_NAMES = {
    "VMOFF": "VMXOFF",
    "VMON": "VMXON",
    "MSR_READ": "RDMSR",
    "MSR_WRITE": "WRMSR",
    "INVALID_STATE": "INVALID_GUEST_STATE",
    "MWAIT_INSTRUCTION": "MWAIT",
    "MONITOR_INSTRUCTION": "MONITOR",
    "PAUSE_INSTRUCTION": "PAUSE",
    "MCE_DURING_VMENTRY": "MCE_DURING_ENTRY",
    "EOI_INDUCED": "VIRTUALIZED_EOI",
    "NOTIFY": "INSTRUCTION_TIMEOUT",
}


@pytest.mark.parametrize(
    ("field", "width", "kind", "index"),
    [
        (Field.VIRTUAL_PROCESSOR_ID, Width.BITS16, Kind.CONTROL, 0),
        (Field.GUEST_CS_SELECTOR, Width.BITS16, Kind.GUEST, 1),
        (Field.HOST_TR_SELECTOR, Width.BITS16, Kind.HOST, 6),
        (Field.EPT_POINTER, Width.BITS64, Kind.CONTROL, 13),
        (Field.GUEST_PHYSICAL_ADDRESS, Width.BITS64, Kind.EXIT_INFO, 0),
        (Field.VMCS_LINK_POINTER, Width.BITS64, Kind.GUEST, 0),
        (Field.HOST_IA32_EFER, Width.BITS64, Kind.HOST, 1),
        (Field.SECONDARY_VM_EXEC_CONTROL, Width.BITS32, Kind.CONTROL, 15),
        (Field.VM_INSTRUCTION_ERROR, Width.BITS32, Kind.EXIT_INFO, 0),
        (Field.VMX_PREEMPTION_TIMER_VALUE, Width.BITS32, Kind.GUEST, 23),
        (Field.HOST_IA32_SYSENTER_CS, Width.BITS32, Kind.HOST, 0),
        (Field.CR3_TARGET_VALUE3, Width.NATURAL, Kind.CONTROL, 7),
        (Field.GUEST_LINEAR_ADDRESS, Width.NATURAL, Kind.EXIT_INFO, 5),
        (Field.GUEST_RIP, Width.NATURAL, Kind.GUEST, 15),
        (Field.HOST_RIP, Width.NATURAL, Kind.HOST, 11),
    ],
)
def test_parts_of_an_encoding(field: Field, width: Width, kind: Kind, index: int) -> None:
    assert (field.width, field.kind, field.index) == (width, kind, index)
    assert Field.encode(width, kind, index) == field


def test_fields_are_proper_encodings_in_order_of_their_group() -> None:
    values = [int(field) for field in Field]
    assert len(set(values)) == len(values) == len(Field.__members__)
    assert all(is_encoding(value) and value & 1 == 0 for value in values)
    groups = [(field.width, field.kind) for field in Field]
    seen = []
    for group in groups:
        if not seen or seen[-1] != group:
            seen.append(group)
    assert len(seen) == len(set(seen)), "a group of equal width and kind is split"
    for prefix, kind in (("GUEST_", Kind.GUEST), ("HOST_", Kind.HOST)):
        odd = {f.name for f in Field if f.name.startswith(prefix) and f.kind is not kind}
        assert odd <= {"GUEST_PHYSICAL_ADDRESS", "GUEST_LINEAR_ADDRESS", "GUEST_DEADLINE_SHADOW"}


def test_high_access_only_for_64_bit_fields() -> None:
    assert Field.EPT_POINTER.high == 0x201B
    assert Field.encode(Width.BITS64, Kind.CONTROL, 13, high=True) == 0x201B
    with pytest.raises(ValueError, match="GUEST_RIP"):
        _ = Field.GUEST_RIP.high
    with pytest.raises(ValueError, match="512"):
        Field.encode(Width.BITS16, Kind.CONTROL, 512)


def test_reserved_encoding_bits() -> None:
    assert not is_encoding(1 << 12)
    assert not is_encoding(0x6C00 | 1 << 15)
    assert not is_encoding(1 << 40)


def test_widths() -> None:
    assert [width.bits for width in Width] == [16, 64, 32, 64]
    assert Field.GUEST_CR0.width.mask == 2**64 - 1
    assert Field.VM_EXIT_REASON.read_only
    assert not Field.GUEST_CR0.read_only


def test_errors_all_have_text() -> None:
    assert [int(error) for error in VmxError] == [
        *range(1, 14),
        *range(15, 21),
        *range(22, 27),
        28,
    ]
    assert len({error.text for error in VmxError}) == len(VmxError)


def test_exit_reasons_agree_with_the_kernel_header() -> None:
    header = next((path for path in UAPI_VMX if path.exists()), None)
    if header is None:
        pytest.skip("no asm/vmx.h: install linux-libc-dev")
    text = header.read_text()
    found = re.findall(r"^#define EXIT_REASON_(\w+)\s+(\d+)$", text, re.M)
    assert len(found) > 50
    ours = {reason.name: int(reason) for reason in ExitReason}
    wrong = {
        name: number
        for name, number in found
        if ours.get(UAPI_NAMES.get(name, name)) != int(number)
    }
    assert not wrong
