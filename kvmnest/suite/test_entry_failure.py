"""What a failed VM entry leaves alone, and what it does nevertheless."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import Entries, entries
from kvmnest.suite.support.failures import OUTCOMES, Failure, broken, write_msr_area
from kvmnest.vmx import (
    Cr0,
    Cr4,
    ExitCtl,
    ExitReason,
    Field,
    IntrType,
    Msr,
    PinCtl,
    ProcCtl,
    Rflags,
    Vector,
    VmxError,
    intr_info,
)
from kvmnest.vmx.outcome import EntryFailure, Exit, Outcome, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(16),
    pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State"),
]

_TPR = pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
_ALL = [
    pytest.param(failure, id=failure.name, marks=_TPR if "TPR" in failure.name else ())
    for failure in Failure
]
#: Failures of the instruction, and failures that look like a VM exit.
_EARLY = _ALL[:3]
_LATE = _ALL[3:]

early = pytest.mark.parametrize("failure", _EARLY)
late = pytest.mark.parametrize("failure", _LATE)
any_failure = pytest.mark.parametrize("failure", _ALL)


def _ran_once(l1: L1) -> Entries:
    """Make a VMCS with exit information that tells: after an exit with an exception."""
    tries = entries(l1, l2=b"\x0f\x0b")  # UD2
    tries.vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.UD
    assert tries({}) == Exit(ExitReason.EXCEPTION_NMI, intr_info=0x80000306)
    return tries


def _existing(l1: L1) -> tuple[int, ...]:
    """Fields of the current VMCS that can be read, the VM-instruction error first."""
    wanted = sorted(Field, key=lambda field: field is not Field.VM_INSTRUCTION_ERROR)
    seen = l1.vmread_list(l1.cpu, tuple(wanted))
    failed = Rflags.CF | Rflags.ZF
    return tuple(field for field, _, rflags in seen if not rflags & failed)


def _snapshot(tries: Entries, fields: Iterable[int]) -> dict[str, int]:
    wanted = tuple(fields)
    values = tries.vmcs.read(*wanted)
    return {Field(field).name: value for field, value in zip(wanted, values, strict=True)}


def _changes(before: dict[str, int], after: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (old, after[name]) for name, old in before.items() if after[name] != old}


# --- the VMCS ---


@early
def test_failed_instruction_changes_one_field(l1: L1, failure: Failure) -> None:
    """VMfailValid writes the VM-instruction error and no other field of the VMCS."""
    tries = _ran_once(l1)
    tries.vmcs.update(broken(tries, failure))
    fields = _existing(l1)
    before = _snapshot(tries, fields)
    assert l1.vmresume() == OUTCOMES[failure]
    changed = _changes(before, _snapshot(tries, fields))
    changed.pop("VM_INSTRUCTION_ERROR", None)
    assert changed == {}


@late
def test_failed_entry_changes_two_fields(l1: L1, failure: Failure) -> None:
    """A failed entry writes exit reason and qualification; all else keeps its value."""
    tries = _ran_once(l1)
    tries.vmcs.update(broken(tries, failure))
    fields = _existing(l1)
    before = _snapshot(tries, fields)
    assert l1.vmresume() == OUTCOMES[failure]
    changed = _changes(before, _snapshot(tries, fields))
    changed.pop("VM_EXIT_REASON", None)
    changed.pop("EXIT_QUALIFICATION", None)
    # Undefined since the exit before, which was not one that reports an address.
    changed.pop("GUEST_LINEAR_ADDRESS", None)
    assert changed == {}


_SAVE = (
    ExitCtl.SAVE_DEBUG_CONTROLS
    | ExitCtl.SAVE_PAT
    | ExitCtl.SAVE_EFER
    | ExitCtl.SAVE_PREEMPTION_TIMER
)
#: What these controls save, with values that this guest cannot have.
_BAIT = (
    (Field.GUEST_IA32_PAT, 0x0606060606060606),
    (Field.GUEST_IA32_DEBUGCTL, 2),
    (Field.GUEST_DR7, 0x7F1),
    (Field.GUEST_IA32_EFER, 0x123),
    (Field.VMX_PREEMPTION_TIMER_VALUE, 0xFEDCBA98),
)


@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS, ExitCtl.SAVE_PAT, ExitCtl.SAVE_EFER)
@pytest.mark.needs(ExitCtl.SAVE_PREEMPTION_TIMER, PinCtl.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize(
    ("failure", "fields"),
    [
        pytest.param(Failure.GUEST_LINK, _BAIT, id="GUEST_LINK"),
        pytest.param(Failure.MSR_LOAD, _BAIT, id="MSR_LOAD"),
        pytest.param(Failure.GUEST_RFLAGS, _BAIT[:2], id="GUEST_RFLAGS"),
        pytest.param(Failure.GUEST_RFLAGS, _BAIT[2:], id="GUEST_RFLAGS-more"),
    ],
)
def test_failed_entry_saves_nothing(
    l1: L1, failure: Failure, fields: tuple[tuple[Field, int], ...]
) -> None:
    """A failed entry saves no guest state, although VM-exit controls ask for more of it."""
    tries = _ran_once(l1)
    values = dict(fields)
    tries.vmcs.update({**tries.using(_SAVE, PinCtl.ACTIVATE_PREEMPTION_TIMER), **values})
    tries.vmcs.update(broken(tries, failure))
    assert l1.vmresume() == OUTCOMES[failure]
    assert dict(zip(values, tries.vmcs.read(*values), strict=True)) == values


@any_failure
def test_launch_state(l1: L1, failure: Failure) -> None:
    """A failed entry changes the launch state neither way."""
    tries = entries(l1)
    wrong = broken(tries, failure)
    right = {field: tries.vmcs.fields().get(field, 0) for field in wrong}
    tries.vmcs.update(wrong)
    assert l1.vmlaunch() == OUTCOMES[failure]
    tries.vmcs.update(right)
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    tries.vmcs.update(wrong)
    assert l1.vmresume() == OUTCOMES[failure]
    tries.vmcs.update(right)
    assert l1.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@any_failure
def test_event_is_not_lost(l1: L1, failure: Failure) -> None:
    """The event to inject stays valid, and is injected by the entry that succeeds."""
    tries = entries(l1)
    event = {
        Field.VM_ENTRY_INTR_INFO_FIELD: intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, True),
        Field.VM_ENTRY_EXCEPTION_ERROR_CODE: 0x5678,
        Field.VM_ENTRY_INSTRUCTION_LEN: 9,
    }
    wrong = broken(tries, failure)
    right = {field: tries.vmcs.fields().get(field, 0) for field in wrong}
    tries.vmcs.update({**event, **wrong})
    assert l1.vmlaunch() == OUTCOMES[failure]
    assert dict(zip(event, tries.vmcs.read(*event), strict=True)) == event
    tries.vmcs.update(right)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL, idt_info=0)
    assert l1.l2_frame(3) == [Vector.GP, 0x5678, l1.sym("l2_vmcall")]


# --- L1's state ---

_HOST = {
    Field.HOST_IA32_SYSENTER_CS: 0x1234,
    Field.HOST_IA32_SYSENTER_ESP: 0x11110000,
    Field.HOST_IA32_SYSENTER_EIP: 0x22220000,
    Field.HOST_FS_BASE: 0x33330000,
    Field.HOST_GS_BASE: 0x44440000,
}
_MSRS = (Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.FS_BASE, Msr.GS_BASE)


def _state(l1: L1) -> list[Outcome]:
    """Registers of L1 that a VM exit loads from the host-state area, and DR7."""
    return [
        *(l1.read_cr(number) for number in (0, 3, 4)),
        *(l1.rdmsr(index) for index in _MSRS),
        l1.read_dr(7),
    ]


def _with_host_state(l1: L1) -> tuple[Entries, list[Outcome]]:
    """Make a VMCS whose host state differs from L1's; also that state as ``_state`` gives it."""
    tries = entries(l1)
    cr0, cr3, cr4 = (tries.vmcs[Field[f"HOST_CR{number}"]] for number in (0, 3, 4))
    control = {
        Field.HOST_CR0: cr0 ^ Cr0.AM,
        Field.HOST_CR3: cr3 ^ 0x18,
        Field.HOST_CR4: cr4 ^ Cr4.TSD,
    }
    tries.vmcs.update({**_HOST, **control})
    assert l1.write_dr(7, 0x700) == Succeed()
    loaded = [Succeed(value) for value in (*control.values(), *_HOST.values(), 0x400)]
    return tries, list(loaded)


@early
def test_failed_instruction_loads_no_host_state(l1: L1, failure: Failure) -> None:
    """VMfailValid goes on with the next instruction of L1 in L1's state."""
    tries, _ = _with_host_state(l1)
    before = _state(l1)
    tries.vmcs.update(broken(tries, failure))
    assert l1.vmlaunch() == OUTCOMES[failure]
    assert _state(l1) == before


@late
def test_failed_entry_loads_host_state(l1: L1, failure: Failure) -> None:
    """A failed entry loads the host-state area like a VM exit does."""
    tries, host = _with_host_state(l1)
    tries.vmcs.update(broken(tries, failure))
    assert l1.vmlaunch() == OUTCOMES[failure]
    assert _state(l1) == host
    loads = l1.cpu.host_loads()
    assert (loads.gdtr_limit, loads.idtr_limit) == (0xFFFF, 0xFFFF)
    assert (loads.gdtr_base, loads.idtr_base) == (l1.sym("l1_gdt"), l1.sym("l1_idt"))
    assert (loads.tr, loads.ldtr) == (l1.sym("SEL_TSS0"), 0)
    assert {loads.ds, loads.es, loads.fs, loads.gs} == {l1.sym("SEL_DATA")}


@late
def test_general_registers(l1: L1, failure: Failure) -> None:
    """A failed entry changes no general register but RSP."""
    tries = entries(l1)
    names = [*("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), *(f"r{n}" for n in range(8, 16))]
    regs = {name: 0x1111111111111111 * (number + 1) for number, name in enumerate(names)}
    tries.vmcs.update(broken(tries, failure))
    outcome = l1.vmlaunch(regs=regs)
    assert outcome == OUTCOMES[failure]
    assert {name: outcome.regs[name] for name in names} == regs


# --- MSR areas ---


def _with_areas(l1: L1) -> Entries:
    """Make a VMCS that stores one MSR on exit and loads another one."""
    tries = entries(l1)
    write_msr_area(l1, l1.sym("exit_store_msrs"), (Msr.LSTAR, 0x5A5A))
    write_msr_area(l1, l1.sym("exit_load_msrs"), (Msr.KERNEL_GS_BASE, 0x7777000))
    tries.vmcs.update(
        {
            Field.VM_EXIT_MSR_STORE_ADDR: l1.sym("exit_store_msrs"),
            Field.VM_EXIT_MSR_STORE_COUNT: 1,
            Field.VM_EXIT_MSR_LOAD_ADDR: l1.sym("exit_load_msrs"),
            Field.VM_EXIT_MSR_LOAD_COUNT: 1,
        }
    )
    assert l1.wrmsr(Msr.LSTAR, 0x1000) == Succeed()
    assert l1.wrmsr(Msr.KERNEL_GS_BASE, 0x2000) == Succeed()
    return tries


@any_failure
def test_exit_msr_areas(l1: L1, failure: Failure) -> None:
    """No failure stores MSRs; one that looks like a VM exit loads them, VMfailValid does not."""
    tries = _with_areas(l1)
    tries.vmcs.update(broken(tries, failure))
    outcome = l1.vmlaunch()
    assert outcome == OUTCOMES[failure]
    assert l1.read_int(l1.sym("exit_store_msrs") + 8) == 0x5A5A
    loaded = isinstance(outcome, EntryFailure)
    assert l1.rdmsr(Msr.KERNEL_GS_BASE) == Succeed(0x7777000 if loaded else 0x2000)


@pytest.mark.sdm("Loading MSRs")
@pytest.mark.parametrize("failure", _ALL[:-1])
def test_entry_msr_area(l1: L1, failure: Failure) -> None:
    """MSRs of the entry area are loaded after all checks: a failure before loads none."""
    tries = entries(l1)
    assert l1.wrmsr(Msr.KERNEL_GS_BASE, 0x2000) == Succeed()
    tries.vmcs.update(broken(tries, failure))
    write_msr_area(l1, l1.sym("entry_load_msrs"), (Msr.KERNEL_GS_BASE, 0x7777000))
    tries.vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR] = l1.sym("entry_load_msrs")
    tries.vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT] = 1
    assert l1.vmlaunch() == OUTCOMES[failure]
    assert l1.rdmsr(Msr.KERNEL_GS_BASE) == Succeed(0x2000)
