"""Registers, access rights, interruption information."""

import pytest

from kvmnest.vmx import AccessRights, Dr6, IntrType, Rflags, Vector, intr_info


@pytest.mark.parametrize(
    ("rights", "value"),
    [
        (AccessRights(type=0xB, l=1, g=1), 0xA09B),
        (AccessRights(type=0x3, db=1, g=1), 0xC093),
        (AccessRights(type=0xB, s=0), 0x8B),
        (AccessRights(type=0, s=0, p=0, unusable=1), 0x10000),
        (AccessRights(type=0x3, dpl=3), 0xF3),
    ],
)
def test_access_rights(rights: AccessRights, value: int) -> None:
    assert int(rights) == value
    assert AccessRights.decode(value) == rights


def test_access_rights_text_and_reserved_bits() -> None:
    assert str(AccessRights(type=0xB, l=1, g=1)) == "type=0xb s=1 dpl=0 p=1 l=1 g=1"
    assert AccessRights.decode(0xA09B | 0xF00 | 1 << 20) == AccessRights(type=0xB, l=1, g=1)


def test_intr_info() -> None:
    assert intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, error_code=True) == 0x80000B0D
    assert intr_info(2, IntrType.NMI) == 0x80000202
    assert intr_info(0x80, IntrType.SOFTWARE_INTERRUPT, valid=False) == 0x480


def test_reserved_ones() -> None:
    assert Rflags.RESERVED1 == 2
    assert Dr6.RESERVED1 == 0xFFFE07F0
