"""VM entries with a few fields changed: which ones are refused, how, and which succeed."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.batch import Changes, batch_size, describe, entries_end_as
from kvmnest.vmx import (
    ExitReason,
    Field,
    Proc2Ctl,
    ProcCtl,
    VmxError,
)
from kvmnest.vmx.control_fields import FIELD_OF
from kvmnest.vmx.outcome import EntryFailure, Exit, HostExit, Outcome, Succeed, VMfailValid
from kvmnest.vmx.registers import PAT_RESET

#: A check on the VM-execution, VM-exit or VM-entry controls failed.
BAD_CONTROL = VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
#: A check on the host-state area failed.
BAD_HOST = VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
#: A check on the guest-state area failed.
BAD_GUEST = EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
#: IA32_PAT with a byte that is no memory type, each byte in turn.
BAD_PATS = tuple(
    PAT_RESET & ~(0xFF << 8 * byte) | bad << 8 * byte
    for byte in range(8)
    for bad in ((2, 3) if byte else (2, 3, 8, 0x46, 0x80, 0xFF))
)

#: Runs a case with EPT and without: KVM then checks other things itself.
EPT_OR_NOT = pytest.mark.parametrize(
    "ept",
    [
        pytest.param(True, id="ept", marks=pytest.mark.needs(Proc2Ctl.ENABLE_EPT)),
        pytest.param(False, id="no-ept"),
    ],
)

#: How many unexpected outcomes a failure lists.
_SHOWN = 8


class Entries:
    """VM entries of the current VMCS; each has some fields changed, which are then put back.

    VMLAUNCH is used until L2 ran once, then VMRESUME: an entry that fails and yet changes the
    launch state makes the next one fail with error 4.
    """

    def __init__(self, l1: L1) -> None:
        self.l1 = l1
        self.vmcs = l1.vmcs
        self.launched = False

    def __repr__(self) -> str:
        return f"<Entries of {self.vmcs!r}>"

    def __call__(self, changes: Changes, **regs: int) -> Outcome:
        """Enter with these fields; L2's general registers are ``regs``."""
        known = self.vmcs.fields()
        before = {field: known.get(field, 0) for field in changes}
        self.vmcs.update(changes)
        enter = self.l1.vmresume if self.launched else self.l1.vmlaunch
        outcome = enter(regs=regs)
        assert not isinstance(outcome, HostExit), f"{describe(changes)}: {outcome!r}"
        self.launched |= isinstance(outcome, Exit)
        self.vmcs.update({Field(field): value for field, value in before.items()})
        return outcome

    def wrong(self, cases: Sequence[tuple[Changes, Outcome]]) -> list[str]:
        """Enter with each of several changes; describe those that did not end as expected."""
        found: list[str] = []
        size = batch_size(self.l1)
        rest = list(cases)
        if rest and isinstance(rest[0][1], Exit) and not self.launched:
            found += self._one_by_one(rest[:1])
            del rest[:1]
        for start in range(0, len(rest), size):
            part = rest[start : start + size]
            enter = "vmresume" if self.launched else "vmlaunch"
            changes, expected = zip(*part, strict=True)
            if not entries_end_as(self.l1, self.vmcs, enter, changes, expected):
                # Some entry may have launched the VMCS that should not have.
                self._make_clear()
                found += self._one_by_one(part)
        return found

    def _one_by_one(self, cases: Sequence[tuple[Changes, Outcome]]) -> list[str]:
        return [
            f"{describe(changes)}: {outcome!r}"
            for changes, expected in cases
            if (outcome := self(changes)) != expected
        ]

    def _make_clear(self) -> None:
        assert self.l1.vmclear(self.vmcs.address) == Succeed()
        assert self.l1.vmptrld(self.vmcs.address) == Succeed()
        self.launched = False

    def using(self, *flags: enum.IntFlag, without: enum.IntFlag | None = None) -> dict[Field, int]:
        """Changes that add controls to the present ones, and take some of one kind away."""
        known = self.vmcs.fields()
        words: dict[Field, int] = {}
        extra: list[enum.IntFlag] = []
        if any(isinstance(flag, Proc2Ctl) for flag in flags):
            extra.append(ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
        for flag in (*flags, *extra):
            field = FIELD_OF[type(flag)]
            words[field] = words.get(field, known.get(field, 0)) | flag.value
        if without is not None:
            field = FIELD_OF[type(without)]
            words[field] = words.get(field, known.get(field, 0)) & ~without.value
        return words

    def vmcall(self, changes: Changes | None = None) -> Exit:
        """Return the exit of an entry that reaches L2's first instruction, a VMCALL."""
        rip = (changes or {}).get(Field.GUEST_RIP, self.vmcs.fields()[Field.GUEST_RIP])
        return Exit(ExitReason.VMCALL, qualification=0, rip=rip, length=3, intr_info=0, idt_info=0)


def entries(
    l1: L1,
    *,
    l2: str | bytes | None = None,
    mode: L2Mode = L2Mode.LONG,
    ept: bool | None = None,
) -> Entries:
    """Return ``Entries`` of a new VMCS; arguments as for ``L1.load_vmcs``."""
    l1.launchable(l2=l2, mode=mode, ept=ept)
    return Entries(l1)


def expect_refused(tries: Entries, expected: Outcome, cases: Iterable[Changes]) -> None:
    """Assert that every change makes VM entry fail so, and that L2 can be entered after all."""
    wrong = tries.wrong([(changes, expected) for changes in cases])
    assert not wrong, shown(f"expected {expected!r}", wrong)
    expect_accepted(tries, [{}])


def expect_accepted(tries: Entries, cases: Iterable[Changes]) -> None:
    """Assert that with every change L2 is entered and executes its VMCALL."""
    usual = tries.vmcall()
    wrong = tries.wrong(
        [
            (changes, usual if Field.GUEST_RIP not in changes else tries.vmcall(changes))
            for changes in cases
        ]
    )
    assert not wrong, shown("expected that L2 executes VMCALL", wrong)


def shown(expected: str, wrong: list[str]) -> str:
    """Text of a failed assertion: what was expected, and the first of what came instead."""
    more = len(wrong) - _SHOWN
    rest = [f"and {more} more"] if more > 0 else []
    return "\n".join([f"{expected}, but:", *wrong[:_SHOWN], *rest])


def each(field: Field, values: Iterable[int], more: Changes | None = None) -> Iterator[Changes]:
    """One change for each value of a field, with ``more`` in all of them."""
    return ({**(more or {}), field: value} for value in values)


def flips(value: int, bits: Iterable[int]) -> list[int]:
    """Return ``value`` with one bit after the other inverted."""
    return [value ^ 1 << bit for bit in bits]


def address_bits(l1: L1) -> tuple[int, int]:
    """Return the widths of L1's physical and linear addresses (CPUID leaf 80000008H)."""
    outcome = l1.cpuid(0x80000008)
    assert isinstance(outcome, Succeed)
    eax: int = outcome.value[0]
    return eax & 0xFF, eax >> 8 & 0xFF


def bad_pages(l1: L1, page: int) -> list[int]:
    """Values for a field that holds the address of a page: unaligned or too wide."""
    physical, _ = address_bits(l1)
    return flips(page, range(12)) + [page | 1 << bit for bit in range(physical, 64)]


def not_canonical(l1: L1) -> list[int]:
    """Linear addresses that are not canonical: at the borders and far from them."""
    _, linear = address_bits(l1)
    top = 1 << linear - 1
    full = (1 << 64) - 1
    return [top, full ^ top, 2 * top, full ^ 2 * top, 1 << 62, full >> 1, 1 << 63]
