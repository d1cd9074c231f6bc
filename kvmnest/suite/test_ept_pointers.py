"""Translations that several EPT pointers share, or each has for itself."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.ept import ENABLE_AD, RWX, VALUE, WRITE_BACK, Access, R, Window
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EptVpidCap, Field, Proc2Ctl
from kvmnest.vmx.outcome import Succeed

pytestmark = [
    pytest.mark.series(17),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.INVEPT_SINGLE_CONTEXT),
]
SINGLE, ALL = 1, 2
OTHER = 0x1122334455667788


def _window(l1: L1) -> Window:
    """A window of two pages, the second of which holds another value."""
    window = Window(Guest(l1), pages=2)
    l1.write_int(window.page + 4096, OTHER)
    return window


def _second_pointer(window: Window) -> int:
    """An EPT pointer to a copy of the top table."""
    l1, own = window.l1, window.guest.vmcs[Field.EPT_POINTER]
    copy = l1.alloc()
    l1.write(copy, l1.read(own & ~0xFFF, 4096))
    return copy | own & 0xFFF


def _reads(window: Window, pointer: int) -> int:
    """What L2 reads from the window under an EPT pointer."""
    window.guest.vmcs[Field.EPT_POINTER] = pointer
    seen = window.access(Access.READ)
    assert seen == Succeed()
    return int(seen.regs["rax"])


@pytest.mark.parametrize("kind", [SINGLE, ALL], ids=["single", "all"])
@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
def test_invept_of_a_pointer_not_in_use(l1: L1, kind: int) -> None:
    """INVEPT invalidates the mappings of its EPT pointer, although L2 ran with another since."""
    window = _window(l1)
    own, second = window.guest.vmcs[Field.EPT_POINTER], _second_pointer(window)
    assert _reads(window, own) == VALUE
    assert _reads(window, second) == VALUE
    window.set(1, window.page + 4096 | WRITE_BACK | RWX)
    assert l1.invept(kind, own if kind == SINGLE else 0) == Succeed()
    assert _reads(window, own) == OTHER


@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
def test_many_pointers(l1: L1) -> None:
    """More pointers than a processor need keep: after INVEPT each reads the new page."""
    window = _window(l1)
    pointers = [window.guest.vmcs[Field.EPT_POINTER]]
    pointers += [_second_pointer(window) for _ in range(5)]
    assert {_reads(window, pointer) for pointer in pointers} == {VALUE}
    window.set(1, window.page + 4096 | WRITE_BACK | RWX)
    for pointer in pointers:
        assert l1.invept(SINGLE, pointer) == Succeed()
        assert _reads(window, pointer) == OTHER


@pytest.mark.needs(EptVpidCap.ACCESSED_DIRTY)
@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
def test_violation_under_a_pointer_to_the_same_table(l1: L1) -> None:
    """An EPT violation invalidates what is cached of its address for that table.

    Bit 6 of the EPT pointer differs, the table does not: no INVEPT is needed after L1 has mended
    the entry.
    """
    window = _window(l1)
    own = window.guest.vmcs[Field.EPT_POINTER]
    window.allow(1, R)
    assert _reads(window, own) == VALUE
    window.guest.vmcs[Field.EPT_POINTER] = own ^ ENABLE_AD
    assert window.access(Access.WRITE) == window.violation(Access.WRITE, R)
    window.allow(1, RWX)
    window.guest.vmcs[Field.EPT_POINTER] = own
    assert window.access(Access.WRITE) == Succeed()
