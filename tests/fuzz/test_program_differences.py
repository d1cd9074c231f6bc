"""Two runs of a program: what differs, what is not defined, what is known. Without a kernel."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program_machines import exit_seen

from kvmnest.errors import HarnessError
from kvmnest.fuzz.programs import defined, known
from kvmnest.fuzz.programs.compare import Difference, differences
from kvmnest.fuzz.programs.places import Ran
from kvmnest.vmx import ExitReason


def test_the_first_difference_is_told_and_a_lasting_one_once() -> None:
    """A field that only one machine changed differs until it is equal again."""
    one = Ran([[exit_seen(ExitReason.CPUID, {"GUEST_CR0": 1})], [exit_seen(ExitReason.HLT, {})]])
    other = Ran([[exit_seen(ExitReason.CPUID, {"GUEST_CR0": 3})], [exit_seen(ExitReason.HLT, {})]])
    (found,) = differences(one, other)
    assert found == Difference(0, 0, "guest.GUEST_CR0", "Exit(CPUID)", 1, 3)
    other.seen[1][0]["guest"] = {"GUEST_CR0": 7}
    assert [(d.step, d.other) for d in differences(one, other)] == [(0, 3), (1, 7)]
    assert not list(differences(one, one))


def test_an_other_end_is_the_last_difference() -> None:
    one = Ran([[exit_seen(ExitReason.CPUID, {})], [{"end": ["Succeed"]}]])
    other = Ran([[{"end": ["VMfailValid", 7]}], [{"end": ["VMfailInvalid"]}]])
    (found,) = differences(one, other)
    assert str(found) == ("step 0: Exit(CPUID) or VMfailValid(7: ENTRY_INVALID_CONTROL_FIELD)")
    (found,) = differences(one, Ran(one.seen[:1]))
    assert (found.step, found.what, found.other) == (1, "end", ["ended"])


@pytest.mark.parametrize(
    ("reason", "seen", "wanted"),
    [
        (ExitReason.CPUID, {"length": 2, "linear": 9}, {"length": 2}),
        (ExitReason.EXTERNAL_INTERRUPT, {"length": 2, "info": 9}, {}),
        # Software interrupts and exceptions have a length, others not.
        (ExitReason.EXCEPTION_NMI, {"length": 1, "intr_info": 0x80000603}, {"length": 1}),
        (ExitReason.EXCEPTION_NMI, {"length": 1, "intr_info": 0x80000306}, {}),
        # A string instruction has a linear address and an address size.
        (ExitReason.IO_INSTRUCTION, {"qualification": 0x10, "linear": 9}, {"linear": 9}),
        (ExitReason.IO_INSTRUCTION, {"qualification": 8, "linear": 9, "info": 0x380}, {}),
        (ExitReason.EPT_VIOLATION, {"qualification": 0x81, "linear": 5, "physical": 5},
         {"linear": 5, "physical": 5}),
        (ExitReason.EPT_VIOLATION, {"qualification": 1, "linear": 5}, {}),
        # The error code counts only where bit 11 says so.
        (ExitReason.EXCEPTION_NMI, {"intr_info": 0x80000306, "intr_error": 5}, {}),
        (ExitReason.EXCEPTION_NMI, {"intr_info": 0x80000B0D, "intr_error": 5}, {"intr_error": 5}),
        # VMREAD to a register: no address, but two registers.
        (ExitReason.VMREAD, {"info": 0x20000400 | 0x3F << 18}, {"info": 0x20000400}),
    ],
)  # fmt: skip
def test_only_what_is_defined_counts(
    reason: ExitReason, seen: dict[str, int], wanted: dict[str, int]
) -> None:
    found = defined.parts(reason, seen)
    for name in ("length", "linear", "info", "physical", "intr_error"):
        assert found.get(name, 0) == wanted.get(name, 0), name


def test_an_unusable_segment_has_no_limit() -> None:
    state = {"GUEST_ES_ACCESS_RIGHTS": 0x1C093, "GUEST_ES_LIMIT": 5, "GUEST_FS_BASE": 7}
    assert defined.guest(state) == {"GUEST_ES_ACCESS_RIGHTS": 0x10000, "GUEST_FS_BASE": 7}


ENTRY = known.Known(
    "guest.GUEST_RFLAGS", "Bochs", "RF", after="Exit(EXCEPTION_NMI) | Exit(HLT)", bits=1 << 16
)


@pytest.mark.parametrize(
    ("end", "one", "other", "explained"),
    [
        ("Exit(HLT)", 2, 0x10002, True),
        ("Exit(HLT)", 2, 0x10003, False),
        ("Exit(CPUID)", 2, 0x10002, False),
        ("Exit(HLT)", None, 0x10002, False),
    ],
)
def test_known_difference(end: str, one: Any, other: Any, explained: bool) -> None:
    difference = Difference(1, 0, "guest.GUEST_RFLAGS", end, one, other)
    assert ENTRY.explains(difference) is explained


@pytest.mark.parametrize(
    ("one", "other", "explained"),
    [
        (["EntryFailure", 33, 0], ["EntryFailure", 33, 4], True),
        (["VMfailValid", 7], ["VMfailValid", 8], True),
        (["EntryFailure", 33, 0], ["EntryFailure", 34, 1], False),
        (["VMfailValid", 7], ["EntryFailure", 33, 0], False),
        (["Exit", 10], ["EntryFailure", 33, 0], False),
    ],
)
def test_checks_of_one_stage_have_no_order(
    one: list[Any], other: list[Any], explained: bool
) -> None:
    difference = Difference(1, 0, "end", "", one, other)
    entries = known.load("7.3.4", "reference")
    assert any(entry.explains(difference) for entry in entries) is explained


def test_a_difference_that_follows_from_another() -> None:
    """It is explained behind the other one only."""
    entry = known.Known("memory.*", "KVM", "x", follows="guest.GUEST_RFLAGS")
    difference = Difference(1, 0, "memory.l2_stack", "Exit(HLT)", 1, 2)
    assert not entry.explains(difference)
    assert entry.explains(difference, {"guest.GUEST_RFLAGS"})


def test_damaged_list_of_differences(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[[difference]]\nwhat = "end"\nwhose = "nobody"\nreason = "x"\n')
    with pytest.raises(HarnessError, match="nobody"):
        known.load("6.1", "reference", path)
    for entry in known.load("7.3.4", "*"):
        assert entry.reason


def test_a_known_difference_that_is_seen_later() -> None:
    """``behind`` an end means that one, or one before it; no other."""
    entry = known.Known("guest.GUEST_DR7", "KVM", "x", behind="EntryFailure(INVALID_GUEST_STATE, *")
    failed = {**exit_seen(ExitReason.HLT, {}), "end": ["EntryFailure", 33, 0]}
    exits = [exit_seen(ExitReason.HLT, {"GUEST_DR7": dr7}) for dr7 in (0x400, 0x401)]
    for first, wanted in ((failed, True), (exit_seen(ExitReason.CPUID, {}), False)):
        (found,) = differences(*(Ran([[first], [seen]]) for seen in exits))
        assert (found.step, entry.explains(found)) == (1, wanted)


def test_bits_of_several_known_differences() -> None:
    """Each bit has an entry that knows it; one without makes it new."""
    entries = [known.Known("guest.GUEST_CR0", "KVM", str(bit), bits=1 << bit) for bit in (4, 30)]
    both = Difference(1, 0, "guest.GUEST_CR0", "Exit(HLT)", 0x31, 0x40000021)
    assert known.explained(both, entries, ()) == entries
    assert known.explained(replace(both, other=0x21), entries, ()) == (entries[0],)
    assert not known.explained(replace(both, other=0x40000020), entries, ())
