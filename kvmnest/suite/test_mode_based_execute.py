"""Mode-based execute control for EPT: fetches from user and from supervisor linear addresses."""

from __future__ import annotations

import itertools

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.ept import (
    RWX,
    VALUE,
    Access,
    R,
    W,
    Window,
    X,
    invalidate,
    poke,
    qualification,
    set_everywhere,
    with_linear_rights,
)
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import EptQualification, EptVpidCap, Proc2Ctl
from kvmnest.vmx.outcome import Outcome, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("EPT Translation Mechanism"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.MODE_BASED_EXECUTE),
]

#: Execute access for user-mode linear addresses; bit 2 is that for supervisor-mode ones.
XU = 1 << 10
ALL = RWX | XU
#: Bits 7:0 of a guest entry for a 2 MiB page: a user page, and a supervisor page.
USER, SUPERVISOR = 0xE7, 0xE3
OFFSET = 0x128
NAMES = {R: "r", W: "w", X: "xs", XU: "xu"}
MIXES = [
    sum(bits)
    for number in range(5)
    for bits in itertools.combinations((R, W, X, XU), number)
    if W not in bits or R in bits
]


def _name(rights: int) -> str:
    return "-".join(name for bit, name in NAMES.items() if rights & bit) or "none"


class _Window(Window):
    """A window under mode-based execute control; all other entries allow everything."""

    def __init__(self, l1: L1) -> None:
        super().__init__(Guest(l1, Proc2Ctl.MODE_BASED_EXECUTE, ept=True))
        set_everywhere(l1, XU)
        for level in self.levels:
            l1.write_int(self.entry(level), self.get(level) | XU)
        self.user = True

    def permit(self, level: int, rights: int) -> None:
        """Let L1 change the permissions in the entry of a level."""
        self.set(level, self.get(level) & ~ALL | rights)
        invalidate(self.guest)

    def map(self, user: bool) -> None:
        """Make the window a user page or a supervisor page in L2's own paging structures."""
        poke(self.l1, self.guest_pd, self.gpa | (USER if user else SUPERVISOR))
        self.user = user

    def expected(self, kind: Access, rights: int) -> Outcome:
        """What an access at OFFSET is to give where the entries together have ``rights``."""
        needed = XU if kind is Access.FETCH and self.user else kind.bit
        if rights & needed:
            return Succeed()
        known = qualification(kind.bit, rights & RWX)
        bit6 = EptQualification(user_executable=True).encode()
        known = Masked(known.value | (bit6 if rights & XU else 0), known.mask | bit6)
        rights_of_linear = with_linear_rights(self.l1, known, user=self.user)
        return self.violation(kind, rights, OFFSET, rights_of_linear)


def _mixes(l1: L1) -> list[int]:
    only = l1.caps.supports(EptVpidCap.EXECUTE_ONLY)
    return [mix for mix in MIXES if only or mix & R or not mix]


@pytest.mark.parametrize("user", [True, False], ids=["user-page", "supervisor-page"])
@pytest.mark.parametrize("kind", Access, ids=lambda kind: kind.name)
def test_permissions(l1: L1, kind: Access, user: bool) -> None:
    """Each mix of permissions at each level: bit 10 is for user pages, bit 2 for the others."""
    window = _Window(l1)
    window.map(user)
    for level, rights in itertools.product(window.levels, _mixes(l1)):
        window.permit(level, rights)
        text = f"level {level}, {_name(rights)}"
        assert window.access(kind, OFFSET) == window.expected(kind, rights), text
        window.permit(level, ALL)


@pytest.mark.parametrize("user", [True, False], ids=["user-page", "supervisor-page"])
def test_permissions_are_anded(l1: L1, user: bool) -> None:
    """Both kinds of execute access are combined by AND over the levels."""
    window = _Window(l1)
    window.map(user)
    for upper, lower in itertools.product(
        (ALL, R | W | X, R | W | XU), (R | X | XU, R | X, R | XU)
    ):
        window.permit(2, upper)
        window.permit(1, lower)
        for kind in Access:
            text = f"{kind.name} {_name(upper)} and {_name(lower)}"
            assert window.access(kind, OFFSET) == window.expected(kind, upper & lower), text


def test_page_changes_its_mode(l1: L1) -> None:
    """The U/S flag in L2's own paging structures decides at each access."""
    window = _Window(l1)
    for rights in (R | W | X, R | W | XU):
        window.permit(1, rights)
        for user in (True, False, True):
            window.map(user)
            seen = window.access(Access.FETCH, OFFSET)
            assert seen == window.expected(Access.FETCH, rights), f"{_name(rights)} {user}"


@pytest.mark.parametrize("bits", [XU, X | XU], ids=["xu", "xs-xu"])
@pytest.mark.sdm("EPT Misconfigurations")
def test_execute_only(l1: L1, bits: int) -> None:
    """Execute access without read access, of either kind, needs the capability."""
    window = _Window(l1)
    window.permit(1, bits)
    seen = window.access(Access.FETCH, OFFSET)
    if l1.caps.supports(EptVpidCap.EXECUTE_ONLY):
        assert seen == Succeed()
    else:
        assert seen == window.misconfiguration(Access.FETCH, OFFSET)


def test_bit_10_without_the_control(l1: L1) -> None:
    """Without the control bit 10 is ignored, and bit 2 is for both kinds of pages."""
    window = _Window(l1)
    window.guest.off(Proc2Ctl.MODE_BASED_EXECUTE)
    for user in (True, False):
        window.map(user)
        for bit10 in (0, XU):
            window.permit(1, R | W | bit10)
            known = with_linear_rights(l1, qualification(X, R | W), user=user)
            expected = window.violation(Access.FETCH, R | W, OFFSET, known)
            assert window.access(Access.FETCH, OFFSET) == expected
            window.permit(1, RWX | bit10)
            assert window.access(Access.FETCH, OFFSET) == Succeed()
    assert l1.read_int(window.page) == VALUE
