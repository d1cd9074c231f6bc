"""Many VMCSs: a fixed random walk over VMCLEAR, VMPTRLD, VMLAUNCH... against a model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from kvmnest.l1 import L1
from kvmnest.vmx import ExitReason, Field, VmxError
from kvmnest.vmx.outcome import Exit, Outcome, Succeed, VMfailInvalid, VMfailValid

pytestmark = [
    pytest.mark.series(8),
    pytest.mark.sdm("Software Use of the VMCS and Related Structures"),
]

NO_VMCS = 0xFFFFFFFFFFFFFFFF
#: Fields that tell one VMCS from another and that L2 leaves alone.
FIELDS = (Field.GUEST_RSP, Field.EXCEPTION_BITMAP, Field.TSC_OFFSET, Field.GUEST_GS_BASE)
LAUNCHED = VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
NOT_LAUNCHED = VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)


@dataclass
class State:
    """What the model knows of one VMCS."""

    address: int
    launched: bool = False
    values: dict[Field, int] = field(default_factory=dict)


class Walk:
    """VMCSs with the baseline, and the model; each step checks one instruction against it."""

    def __init__(self, l1: L1, count: int, seed: int) -> None:
        self.l1, self.random = l1, random.Random(seed)
        l1.enter_vmx()
        self.states = []
        for number in range(count):
            vmcs = l1.load_vmcs(l1.alloc(), ept=None if number % 2 == 0 else False)
            vmcs.flush()
            values = {f: vmcs.baseline[f] for f in FIELDS if f in vmcs.baseline}
            self.states.append(State(vmcs.address, values=values))
        self.current: State | None = self.states[-1]

    def _vmx(self, seen: Outcome, expected: Outcome, what: str) -> None:
        assert seen == expected, what

    def clear(self, state: State) -> None:
        """VMCLEAR: not launched any more; not current if it was."""
        self._vmx(self.l1.vmclear(state.address), Succeed(), "VMCLEAR")
        state.launched = False
        if state is self.current:
            self.current = None

    def load(self, state: State) -> None:
        """VMPTRLD: current, and nothing else."""
        self._vmx(self.l1.vmptrld(state.address), Succeed(), "VMPTRLD")
        self.current = state

    def store(self) -> None:
        """VMPTRST shows the current VMCS or all ones."""
        address = self.current.address if self.current else NO_VMCS
        self._vmx(self.l1.vmptrst(), Succeed(address), "VMPTRST")

    def write(self) -> None:
        """VMWRITE to the current VMCS."""
        which, value = self.random.choice(FIELDS), self.random.randrange(1 << 31)
        seen = self.l1.vmwrite(which, value)
        if self.current is None:
            assert seen == VMfailInvalid()
            return
        assert seen == Succeed()
        self.current.values[which] = value

    def read(self) -> None:
        """VMREAD gives what was written last to this VMCS."""
        for which in FIELDS:
            seen = self.l1.vmread(which)
            if self.current is None:
                assert seen == VMfailInvalid()
            elif which in self.current.values:
                assert seen == Succeed(self.current.values[which]), which.name

    def enter(self, resume: bool) -> None:
        """VMLAUNCH or VMRESUME by the launch state; L2 runs and exits by VMCALL."""
        seen = self.l1.vmresume() if resume else self.l1.vmlaunch()
        if self.current is None:
            assert seen == VMfailInvalid()
        elif self.current.launched != resume:
            assert seen == (NOT_LAUNCHED if resume else LAUNCHED)
        else:
            assert seen == Exit(ExitReason.VMCALL)
            self.current.launched = True

    def step(self) -> None:
        """One random instruction."""
        state = self.random.choice(self.states)
        match self.random.choice("clllsswwwrreEE"):
            case "c":
                self.clear(state)
            case "l":
                self.load(state)
            case "s":
                self.store()
            case "w":
                self.write()
            case "r":
                self.read()
            case "e":
                self.enter(False)
            case _:
                self.enter(self.current.launched if self.current else True)

    def finish(self) -> int:
        """Check all of them, and return how many there are."""
        for state in self.states:
            self.load(state)
            self.store()
            self.read()
            self.enter(state.launched)
        return len(self.states)


@pytest.mark.parametrize(("count", "seed", "steps"), [(3, 1, 150), (10, 2, 200)], ids=["3", "10"])
def test_random_walk(l1: L1, count: int, seed: int, steps: int) -> None:
    """Whatever the order, each VMCS keeps its own launch state and fields."""
    walk = Walk(l1, count, seed)
    for _ in range(steps):
        walk.step()
    assert walk.finish() == len(walk.states)


def test_twenty_vmcss_in_turn(l1: L1) -> None:
    """Twenty VMCSs are launched, then resumed in another order; then cleared and launched anew."""
    walk = Walk(l1, 20, 4)
    for state in walk.states:
        walk.load(state)
        walk.enter(False)
    for state in walk.random.sample(walk.states, 10):
        walk.load(state)
        walk.enter(True)
    for state in walk.states[::4]:
        walk.clear(state)
        walk.load(state)
        walk.enter(True)
        walk.enter(False)
    assert walk.finish() == 20


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_clear_in_any_order(l1: L1) -> None:
    """VMCLEAR of one VMCS after the other: the current one stays until its own turn."""
    walk = Walk(l1, 5, 5)
    orders = (walk.states, walk.states[::-1], walk.random.sample(walk.states, 5))
    for order in orders:
        for state in walk.states:
            walk.load(state)
            walk.enter(False)
        for state in order:
            walk.clear(state)
            walk.store()
            walk.read()
            walk.enter(True)
    assert walk.finish() == len(walk.states)


@pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure")
def test_load_of_the_current_vmcs(l1: L1) -> None:
    """VMPTRLD of the VMCS that is current changes nothing, launched or not."""
    walk = Walk(l1, 1, 6)
    (state,) = walk.states
    for turn in range(6):
        walk.write()
        walk.load(state)
        walk.read()
        walk.enter(turn > 0)
    assert walk.finish() == 1


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_clear_of_others_while_launched(l1: L1) -> None:
    """VMCLEAR of other VMCSs between two VMRESUMEs of one does not disturb it."""
    walk = Walk(l1, 6, 7)
    first, *others = walk.states
    walk.load(first)
    walk.enter(False)
    for state in (*others, *others):
        walk.clear(state)
        walk.store()
        walk.enter(True)
    assert walk.finish() == len(walk.states)


def test_vmxoff_keeps_cleared_vmcss(l1: L1) -> None:
    """VMCSs that were cleared can be used after VMXOFF and VMXON with what they hold."""
    walk = Walk(l1, 5, 8)
    for state in walk.states:
        walk.load(state)
        walk.write()
        walk.enter(False)
        walk.clear(state)
    assert l1.vmxoff() == Succeed()
    l1.enter_vmx()
    walk.current = None
    walk.store()
    assert walk.finish() == len(walk.states)
