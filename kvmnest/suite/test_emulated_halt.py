"""HLT of L2 that KVM's emulator carries out: without HLT exiting it is no #UD and no exit."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.emulation import PREFIX, forced
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitReason, PinCtl, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit, Fault

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Instructions That Cause VM Exits Conditionally"),
    pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER),
]

__all__ = ["forced"]

HLT = b"\xf4"
BEHIND = len(PREFIX + HLT)


def test_halt(l1: L1, forced: bytes) -> None:
    """L2 gets behind HLT, where a timer or the end of its code exits; it does not fault."""
    guest = Guest(l1, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    guest.off(ProcCtl.HLT_EXITING)
    seen = guest.run(PREFIX + HLT, VMX_PREEMPTION_TIMER_VALUE=100_000)
    if not isinstance(seen, Exit):
        assert not isinstance(seen, Fault), repr(seen)
    else:
        assert seen == Exit(ExitReason.PREEMPTION_TIMER, rip=guest.at(BEHIND))


def test_user_mode(l1: L1, forced: bytes) -> None:
    """HLT at CPL 3 is #GP, emulated or not."""
    guest = Guest(l1)
    guest.off(ProcCtl.HLT_EXITING)
    guest.set_cpl(3)
    assert guest.run(PREFIX + HLT) == Fault(Vector.GP, error_code=0, rip=len(PREFIX))
