"""Outcomes as values: what is compared, what is not, and what is unpacked only when asked for."""

import copy
import dataclasses
import pickle

import pytest

from kvmnest.vmx import ExitReason, Vector, VmxError
from kvmnest.vmx.outcome import (
    ANY,
    EntryFailure,
    Exit,
    Fault,
    HostExit,
    Outcome,
    Succeed,
    VMfailInvalid,
    VMfailValid,
    WrongFlags,
)

EXIT_PARTS = (
    *("qualification", "rip", "length", "intr_info", "intr_error"),
    *("idt_info", "idt_error", "info", "linear", "physical"),
)


class Seen:
    """What L1 saw; counts how often somebody looked."""

    def __init__(self) -> None:
        self.looked = 0

    @property
    def regs(self) -> dict[str, int]:
        self.looked += 1
        return {"rax": 7}

    @property
    def cr2(self) -> int:
        return 0x1000

    @property
    def rflags(self) -> int:
        return 0x46


def exit_seen() -> Exit:
    return Exit.read(Seen(), ExitReason.VMCALL, tuple(range(1, 11)))


DIFFERENT = [
    (Succeed(1), Succeed(2)),
    (VMfailValid(VmxError(7)), VMfailValid(VmxError(8))),
    (WrongFlags(0x41), WrongFlags(0x44)),
    (Fault(Vector.UD), Fault(Vector.GP)),
    (Fault(Vector.GP, error_code=0), Fault(Vector.GP, error_code=8)),
    (EntryFailure(ExitReason.INVALID_GUEST_STATE, 0), EntryFailure(ExitReason.MSR_LOAD_FAIL, 0)),
    (HostExit("a"), HostExit("b")),
    (Succeed(), VMfailInvalid()),
    (Exit(ExitReason.VMCALL), EntryFailure(ExitReason.VMCALL)),
]


@pytest.mark.parametrize(("one", "two"), DIFFERENT)
def test_different(one: Outcome, two: Outcome) -> None:
    assert one != two
    assert two != one
    assert one == copy.copy(one)


@pytest.mark.parametrize("number", range(len(EXIT_PARTS)))
def test_each_part_of_an_exit_is_compared(number: int) -> None:
    """Both ways round, and also between two exits that L1 has seen."""
    name = EXIT_PARTS[number]
    right = Exit(ExitReason.VMCALL, **{name: number + 1})
    wrong = Exit(ExitReason.VMCALL, **{name: 99})
    assert exit_seen() == right
    assert right == exit_seen()
    assert exit_seen() != wrong
    assert wrong != exit_seen()
    values = [*range(1, 11)]
    values[number] = 99
    other = Exit.read(Seen(), ExitReason.VMCALL, tuple(values))
    assert exit_seen() != other
    assert other != exit_seen()
    assert getattr(exit_seen(), name) == number + 1


def test_what_is_not_stated_equals_everything() -> None:
    assert exit_seen() == Exit(ExitReason.VMCALL) == exit_seen()
    assert exit_seen() == Exit(ExitReason.VMCALL, qualification=ANY, rip=2)
    assert exit_seen() != Exit(ExitReason.CPUID)
    assert Succeed(5) == Succeed()
    assert Exit(ANY) == exit_seen()


def test_registers_are_not_compared_and_unpacked_once() -> None:
    seen = Seen()
    outcome = Succeed.made(seen, value=3)
    assert outcome == Succeed(3, regs={"rax": 1}, rflags=2)
    assert seen.looked == 0
    assert (outcome.regs["rax"], outcome.rflags) == (7, 0x46)
    assert outcome.regs is outcome.regs
    assert seen.looked == 1
    assert exit_seen().cr2 == 0x1000
    assert Succeed(3).regs == {}
    assert (Succeed(3).rflags, Exit(ExitReason.VMCALL).cr2) == (0, 0)


def test_a_part_that_it_does_not_have() -> None:
    with pytest.raises(AssertionError, match="no value: the outcome is VMfailInvalid"):
        _ = VMfailInvalid().value
    with pytest.raises(AttributeError):
        _ = VMfailInvalid()._private


def test_repr_states_what_is_stated() -> None:
    assert repr(Exit(ExitReason.VMCALL, rip=16)) == "Exit(reason=VMCALL, rip=0x10)"
    assert repr(exit_seen()).startswith("Exit(reason=VMCALL, qualification=0x1, rip=0x2, length=")
    assert repr(Succeed.made(Seen())) == "Succeed()"
    assert repr(Fault(Vector.GP, rip=0, regs={"rax": 1})) == "Fault(vector=GP, rip=0x0)"


@pytest.mark.parametrize(
    ("kind", "args", "parts"),
    [
        (Fault, (), {}),
        (WrongFlags, (1, 2), {}),
        (Succeed, (1,), {"value": 2}),
        (Exit, (ExitReason.VMCALL,), {"qualificaton": 1}),
    ],
)
def test_wrong_arguments(
    kind: type[Outcome], args: tuple[object, ...], parts: dict[str, object]
) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} takes"):
        kind(*args, **parts)


def test_values() -> None:
    outcome = exit_seen()
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome.reason = 1  # type: ignore[misc]
    assert hash(outcome) == hash(Exit(ExitReason.VMCALL))
    for same in (copy.deepcopy(outcome), pickle.loads(pickle.dumps(Exit(ExitReason.VMCALL, 1)))):
        assert same == outcome
    assert [item.name for item in dataclasses.fields(outcome)[:2]] == ["reason", "qualification"]
    assert dataclasses.replace(Exit(ExitReason.VMCALL), rip=5) == Exit(ExitReason.VMCALL, rip=5)
