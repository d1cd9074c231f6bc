"""What a failure says: numbers with their bits named, the difference first, no noise."""

import collections
import re

import pytest
from plugin_helpers import run_pytest

from kvmnest import disassembly
from kvmnest.cases import explain
from kvmnest.l1.command import Command, Frame, Kind
from kvmnest.l1.vmcs import FieldValue, Vmcs
from kvmnest.vmx import ExitReason, Field, Vector
from kvmnest.vmx.outcome import Exit, Succeed

_CR0 = Field.GUEST_CR0.value


@pytest.mark.parametrize(
    ("got", "expected", "first"),
    [
        (0x80010032, 0x80010033, "got 0x80010032, expected 0x80010033, differing in 0x1"),
        (FieldValue(_CR0, 0x21), 0x31, "GUEST_CR0: got 0x21 (PE|NE), expected 0x31 (PE|ET|NE)"),
        ((FieldValue(_CR0, 1),), (0,), "GUEST_CR0: got 0x1 (PE), expected 0x0"),
        ((5, FieldValue(_CR0, 1)), (5, 0), "GUEST_CR0: got 0x1 (PE), expected 0x0"),
        ((1, 0xFFFF), (1, 0xFFFE), "[1]: got 0xffff, expected 0xfffe, differing in 0x1"),
        ([0x10], [0x10, 0x20], "[1]: got nothing, expected 0x20"),
        ({"rax": 0x20}, {}, "rax: got 0x20, expected nothing"),
        ({"rax": 0x20}, {"rax": 0x40}, "rax: got 0x20, expected 0x40"),
        (0x10, Vector.GP, "got 0x10, expected GP (0xd)"),
        (Succeed(0x10), Succeed(0x11), "Succeed: value: got 0x10, expected 0x11"),
        (Succeed(), Exit(ExitReason.HLT), "got Succeed(), expected Exit(reason=HLT)"),
    ],
)
def test_the_difference_comes_first(got, expected, first):
    assert explain.explains(got, expected)
    lines = explain.compare(got, expected)
    assert lines[0].startswith(first)
    assert not any(re.search(r"(?<![\w.])\d{3,}\b", line) for line in lines), lines


@pytest.mark.parametrize(
    ("got", "expected"), [(True, False), (2, 3), ("a", "b"), (["a"], ["b"]), (None, 4), (1.5, 2)]
)
def test_what_pytest_says_as_well_is_left_to_it(got, expected):
    assert not explain.explains(got, expected)


def test_an_exit_that_was_seen_hides_zeros_and_one_that_is_expected_does_not():
    seen = Exit(ExitReason.CPUID, 0, 0x47000, 2, 0, 0, 0, 0, 0, 0, 0)
    assert repr(seen) == "Exit(reason=CPUID, rip=0x47000, length=0x2)"
    wanted = Exit(ExitReason.CPUID, qualification=0)
    assert repr(wanted) == "Exit(reason=CPUID, qualification=0x0)"


class _Fake:
    """As much of an L1 as a report reads, without a VM: 64-bit code at 0x1000."""

    def __init__(self, log, code=b""):
        self.log = collections.deque(log)
        self.cpu = self
        self.vmcs = Vmcs(None, 0, {Field.GUEST_RIP: 0x1000})
        self.vmcs.update({Field.GUEST_CS_ACCESS_RIGHTS: 0xA09B, Field.VM_ENTRY_CONTROLS: 0x200})
        self._code = code

    def read(self, address, length):
        assert address == 0x1000
        return self._code.ljust(length, b"\xcc")[:length]

    def vmcs_diff(self):
        return []


def command(kind, name):
    return Command(Frame(kind, name, 0, 0x2000), {})


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(explain, "_is_l1", lambda value: isinstance(value, _Fake))
    monkeypatch.setattr(explain, "_objections", lambda l1: [])
    return lambda *args: explain.context([_Fake(*args)], "")


def test_registers_with_the_pattern_are_left_out(report):
    text = report([("vmlaunch rax=0x101010101010101 rcx=0x7 r15=0xf0f0f0f0f0f0f0f rdx=0x0", "")])
    assert "\n  vmlaunch rcx=0x7 rdx=0x0\n" in text
    assert "default pattern left out" in text
    assert "left out" not in report([("vmlaunch rcx=0x1010101010101010", "")])


@pytest.mark.parametrize("installed", [True, False])
def test_l2s_code_is_disassembled_where_capstone_is(report, monkeypatch, installed):
    if installed:
        pytest.importorskip("capstone")
    else:
        monkeypatch.setattr(disassembly, "available", lambda: False)
    code = b"\x0f\xa2\x90" + b"\x0f\x01\xc1\xf4"
    text = disassembly.expand(report([(command(Kind.ENTRY, "vmlaunch"), Succeed())], code))
    if installed:
        assert "L2's code (64-bit):\n  0x1000  cpuid\n  0x1002  nop\n  0x1003  vmcall\n" in text
    else:
        assert "L2's code at 0x1000, 64-bit: 0f a2 90 0f 01 c1\n" in text


def test_without_an_entry_there_is_no_code(report):
    assert "L2's code" not in report([(command(Kind.PLAIN, "cpuid"), Succeed())], b"\x0f\xa2")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("where <kvmnest.a.Guest object at 0x7f001122> = f", "where <Guest> = f"),
        ("<function f.<locals>.g at 0x7f00>", "<function f.<locals>.g>"),
        ("<bound method A.f of <m.A object at 0x7fab>>", "<bound method A.f of <A>>"),
        ("L2's code at 0x47000", "L2's code at 0x47000"),
        ("<VMCS at 0x12000>", "<VMCS at 0x12000>"),
    ],
)
def test_addresses_of_python_objects_are_gone(text, shown):
    assert explain.readable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("E   assert (0x80010033 & 2147483648)", "E   assert (0x80010033 & 0x80000000)"),
        ("E   assert 100000 == f()", "E   assert 100000 == f()"),
        ("kernel 6.12.100000 took 0x1 and 12345.5 s", "kernel 6.12.100000 took 0x1 and 12345.5 s"),
        ("0x1\n70000", "0x1\n70000"),
        ("0x1 of 9999", "0x1 of 9999"),
    ],
)
def test_a_line_has_its_numbers_in_one_base(text, shown):
    assert explain.readable(text) == shown


@pytest.mark.parametrize(
    ("left", "op", "right", "text"),
    [
        (FieldValue(_CR0, 0x21), ">=", 0x31, "GUEST_CR0: 0x21 (PE|NE) >= 0x31 (PE|ET|NE)"),
        (FieldValue(_CR0, 1), "in", (2, 33), "GUEST_CR0: 0x1 (PE) in (0x2, 0x21)"),
        (0x80000000, "!=", 0x80000000, "0x80000000 != 0x80000000"),
        (0x20, "not in", {0x20, 0x10}, "0x20 not in {0x10, 0x20}"),
        (-11, "<", -12, "-0xb < -0xc"),
    ],
)
def test_other_comparisons(left, op, right, text):
    assert explain.relation(op, left, right) == [text]


@pytest.mark.parametrize(("left", "op", "right"), [(3, "<", 2), ("a", "in", "b"), (True, "!=", 1)])
def test_other_comparisons_that_are_left_to_pytest(left, op, right):
    assert explain.relation(op, left, right) is None


def test_reprs_have_no_addresses(module):
    folder = module(
        """
from kvmnest.kvm import Memory
def test_it(kvm, vm, l1):
    memory = Memory(4096)
    for each in (kvm, vm, l1, l1.cpu, l1.payload, memory, l1.vm):
        assert " object at 0x" not in repr(each)
        assert len(repr(each)) < 120
""",
        suite=False,
    )
    done = run_pytest(folder)
    assert "1 passed" in done.stdout or "1 skipped" in done.stdout, done.stdout


def test_numbers_of_tests_that_do_not_use_kvmnest_stay_decimal(module):
    folder = module("def test_it(): assert 1000 == 1001\n", suite=False)
    assert "assert 1000 == 1001" in run_pytest(folder).stdout
