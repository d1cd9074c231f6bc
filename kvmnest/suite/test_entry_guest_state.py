"""VM entry checks activity state, interruptibility state and pending debug exceptions."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.batch import Changes
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    Entries,
    each,
    entries,
    expect_accepted,
    expect_refused,
    shown,
)
from kvmnest.suite.support.segments import user_mode
from kvmnest.vmx import (
    ActivityState,
    DebugCtl,
    EntryCtl,
    ExitReason,
    Field,
    Interruptibility,
    IntrType,
    Misc,
    PendingDebug,
    PinCtl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import EntryFailure, Exit, Succeed

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("Checks on Guest Non-Register State")]

_STATE = Field.GUEST_ACTIVITY_STATE
_BLOCKING = Field.GUEST_INTERRUPTIBILITY_INFO
_PENDING = Field.GUEST_PENDING_DBG_EXCEPTIONS
_INFO = Field.VM_ENTRY_INTR_INFO_FIELD
_RFLAGS = Field.GUEST_RFLAGS

_STI, _MOV_SS = int(Interruptibility.STI), int(Interruptibility.MOV_SS)
_IF_SET = 2 | Rflags.IF
#: What the delivery of an event in L2 changes.
_CHANGED = (Field.GUEST_RIP, Field.GUEST_RSP, _RFLAGS, _BLOCKING, _STATE, _PENDING)


def expect_delivered(tries: Entries, cases: Iterable[Changes]) -> None:
    """Assert that each injected event reaches L2's handler of its vector."""
    wrong = []
    for changes in cases:
        outcome = tries(changes)
        if outcome != Exit(ExitReason.VMCALL):
            wrong.append(f"{changes[_INFO]:#x}: {outcome!r}")
            continue
        (vector,) = tries.l1.l2_frame(1)
        if vector != changes[_INFO] & 0xFF:
            wrong.append(f"{changes[_INFO]:#x}: vector {vector}")
        known = tries.vmcs.fields()
        tries.vmcs.update({field: known.get(field, 0) for field in _CHANGED})
    assert not wrong, shown("expected delivery in L2", wrong)


def _interrupt(vector: int = 32) -> int:
    return intr_info(vector, IntrType.EXTERNAL_INTERRUPT)


def _exception(vector: int, code: bool = False) -> int:
    return intr_info(vector, IntrType.HARDWARE_EXCEPTION, error_code=code)


_NMI = intr_info(Vector.NMI, IntrType.NMI)


# --- activity state ---


def test_activity_state_supported(l1: L1) -> None:
    """Only the activity states that IA32_VMX_MISC reports can be entered."""
    tries = entries(l1)
    supported = {int(state) for state in l1.caps.misc.activity_states}
    values = [value for value in range(16) if value not in supported]
    values += [1 << bit for bit in range(4, 32)] + [0xFFFFFFFF]
    expect_refused(tries, BAD_GUEST, each(_STATE, values))


@pytest.mark.parametrize("state", [ActivityState.HLT, ActivityState.SHUTDOWN], ids=lambda s: s.name)
def test_blocking_needs_active_state(l1: L1, state: ActivityState) -> None:
    """Blocking by STI or by MOV SS is refused in any state but active."""
    tries = entries(l1)
    # The event ends a wait that should not have been entered.
    event = _exception(Vector.DB if state is ActivityState.HLT else Vector.MC)
    cases = [
        {_STATE: state, _INFO: event, _BLOCKING: blocking, _RFLAGS: flags}
        for blocking, flags in ((_STI, _IF_SET), (_MOV_SS, _IF_SET), (_MOV_SS, 2))
    ]
    wrong = [repr(outcome) for changes in cases if (outcome := tries(changes)) != BAD_GUEST]
    assert not wrong, shown(f"expected {BAD_GUEST!r}", wrong)


def test_halt_needs_dpl_0(l1: L1) -> None:
    """The HLT state needs SS.DPL 0, since HLT is an instruction of CPL 0."""
    tries = entries(l1)
    if ActivityState.HLT not in l1.caps.misc.activity_states:
        pytest.skip("needs ActivityState.HLT: IA32_VMX_MISC allows only the active state")
    event = {_INFO: _interrupt(), _RFLAGS: _IF_SET}
    assert tries({_STATE: ActivityState.HLT, **user_mode(l1), **event}) == BAD_GUEST
    expect_delivered(tries, [{_STATE: ActivityState.HLT, **event}])


def test_events_in_halt(l1: L1) -> None:
    """In the HLT state interrupts, NMIs, #DB and #MC can be injected; they end it."""
    tries = entries(l1)
    if ActivityState.HLT not in l1.caps.misc.activity_states:
        pytest.skip("needs ActivityState.HLT: IA32_VMX_MISC allows only the active state")
    tries.vmcs.update({_STATE: ActivityState.HLT, _RFLAGS: _IF_SET})
    good = [_interrupt(32), _interrupt(255), _NMI, _exception(Vector.DB), _exception(Vector.MC)]
    expect_delivered(tries, each(_INFO, good))
    assert tries.vmcs.read(_STATE) == (ActivityState.HLT,)


def test_events_refused_in_halt(l1: L1) -> None:
    """In the HLT state no other exception and no software event can be injected."""
    tries = entries(l1)
    if ActivityState.HLT not in l1.caps.misc.activity_states:
        pytest.skip("needs ActivityState.HLT: IA32_VMX_MISC allows only the active state")
    tries.vmcs.update({_STATE: ActivityState.HLT, _RFLAGS: _IF_SET})
    tries.vmcs[Field.VM_ENTRY_INSTRUCTION_LEN] = 1
    bad = [
        *(_exception(vector) for vector in (Vector.DE, Vector.BP, Vector.UD, Vector.NM)),
        *(_exception(vector, code=True) for vector in (Vector.DF, Vector.GP, Vector.PF)),
        intr_info(0x80, IntrType.SOFTWARE_INTERRUPT),
        intr_info(Vector.DB, IntrType.PRIVILEGED_SOFTWARE_EXCEPTION),
        intr_info(Vector.BP, IntrType.SOFTWARE_EXCEPTION),
    ]
    wrong = [hex(info) for info in bad if tries({_INFO: info}) != BAD_GUEST]
    assert not wrong


@pytest.mark.needs(Misc.ACTIVITY_WAIT_FOR_SIPI, PinCtl.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("name", ["interrupt", "NMI", "DB", "UD"])
def test_events_refused_in_wait_for_sipi(l1: L1, name: str) -> None:
    """In the wait-for-SIPI state no event can be injected."""
    events = {
        "interrupt": _interrupt(),
        "NMI": _NMI,
        "DB": _exception(Vector.DB),
        "UD": _exception(Vector.UD),
    }
    tries = entries(l1)
    # The timer ends the wait, should it begin.
    tries.vmcs.update(tries.using(PinCtl.ACTIVATE_PREEMPTION_TIMER))
    tries.vmcs.update({Field.VMX_PREEMPTION_TIMER_VALUE: 0, _RFLAGS: _IF_SET})
    waiting = {_STATE: ActivityState.WAIT_FOR_SIPI}
    assert tries(waiting) == Exit(ExitReason.PREEMPTION_TIMER)
    assert tries({**waiting, _INFO: events[name]}) == BAD_GUEST


# --- interruptibility state ---


def test_interruptibility_reserved_bits(l1: L1) -> None:
    """Bits 31:5 of the interruptibility state must be 0."""
    tries = entries(l1)
    bad = [1 << bit for bit in range(5, 32)] + [0xFFFFFFE0]
    expect_refused(tries, BAD_GUEST, each(_BLOCKING, bad))


def test_blocking_by_sti_and_mov_ss(l1: L1) -> None:
    """Blocking by STI and by MOV SS cannot both be; each alone can."""
    tries = entries(l1)
    tries.vmcs[_RFLAGS] = _IF_SET
    both = _STI | _MOV_SS
    expect_refused(tries, BAD_GUEST, each(_BLOCKING, [both, both | Interruptibility.NMI]))
    expect_accepted(tries, each(_BLOCKING, [_STI, _MOV_SS]))


def test_blocking_by_sti_needs_if(l1: L1) -> None:
    """Blocking by STI needs RFLAGS.IF; blocking by MOV SS and by NMI do not."""
    tries = entries(l1)
    nmi = int(Interruptibility.NMI)
    expect_refused(tries, BAD_GUEST, each(_BLOCKING, [_STI, _STI | nmi], {_RFLAGS: 2}))
    expect_accepted(tries, each(_BLOCKING, [_MOV_SS, nmi, _MOV_SS | nmi], {_RFLAGS: 2}))


def test_blocking_by_smi(l1: L1) -> None:
    """Blocking by SMI is refused outside SMM."""
    tries = entries(l1)
    smi = int(Interruptibility.SMI)
    expect_refused(tries, BAD_GUEST, each(_BLOCKING, [smi, smi | Interruptibility.NMI]))


def test_enclave_interruption(l1: L1) -> None:
    """Enclave interruption needs a processor with SGX and excludes blocking by MOV SS."""
    tries = entries(l1)
    enclave = int(Interruptibility.ENCLAVE)
    outcome = l1.cpuid(7)
    assert isinstance(outcome, Succeed)
    bad = [enclave | _MOV_SS]
    if not outcome.value[1] & 1 << 2:
        bad.append(enclave)
    expect_refused(tries, BAD_GUEST, each(_BLOCKING, bad))


# --- interruptibility state and events ---


def test_interrupt_while_blocked(l1: L1) -> None:
    """An external interrupt is not injected under blocking by STI or by MOV SS."""
    tries = entries(l1)
    tries.vmcs[_RFLAGS] = _IF_SET
    cases = [
        {_INFO: _interrupt(vector), _BLOCKING: blocking}
        for vector in (32, 255)
        for blocking in (_STI, _MOV_SS)
    ]
    expect_refused(tries, BAD_GUEST, cases)
    expect_delivered(tries, [{_INFO: _interrupt(), _BLOCKING: int(Interruptibility.NMI)}])


def test_nmi_while_blocked_by_mov_ss(l1: L1) -> None:
    """An NMI is not injected under blocking by MOV SS."""
    tries = entries(l1)
    cases = each(_RFLAGS, [2, _IF_SET], {_INFO: _NMI, _BLOCKING: _MOV_SS})
    expect_refused(tries, BAD_GUEST, cases)


def test_nmi_while_blocked_by_sti(l1: L1) -> None:
    """Under blocking by STI a processor either injects an NMI or fails with qualification 3."""
    tries = entries(l1)
    changes = {_INFO: _NMI, _BLOCKING: _STI, _RFLAGS: _IF_SET}
    outcome = tries(changes)
    refused = EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=3)
    assert outcome in (refused, Exit(ExitReason.VMCALL))
    if outcome != refused:
        assert l1.l2_frame(1) == [Vector.NMI]


_NMI_WHILE_BLOCKED = {_INFO: _NMI, _BLOCKING: int(Interruptibility.NMI)}


@pytest.mark.needs(PinCtl.VIRTUAL_NMIS)
def test_virtual_nmi_while_blocked_by_nmi(l1: L1) -> None:
    """With virtual NMIs no NMI is injected under blocking by NMI."""
    tries = entries(l1)
    virtual = tries.using(PinCtl.VIRTUAL_NMIS | PinCtl.NMI_EXITING)
    expect_refused(tries, BAD_GUEST, [{**_NMI_WHILE_BLOCKED, **virtual}])
    expect_delivered(tries, [{**virtual, _INFO: _NMI, _BLOCKING: 0}])


def test_nmi_while_blocked_by_nmi(l1: L1) -> None:
    """Without virtual NMIs an NMI is injected under blocking by NMI."""
    expect_delivered(entries(l1), [_NMI_WHILE_BLOCKED])


def test_exceptions_while_blocked(l1: L1) -> None:
    """Exceptions are injected whatever is blocked."""
    tries = entries(l1)
    tries.vmcs[_RFLAGS] = _IF_SET
    cases = [
        {_INFO: _exception(Vector.UD), _BLOCKING: blocking}
        for blocking in (_STI, _MOV_SS, int(Interruptibility.NMI))
    ]
    expect_delivered(tries, cases)


# --- pending debug exceptions ---


@pytest.mark.parametrize("half", ["low", "high"])
def test_pending_debug_reserved_bits(l1: L1, half: str) -> None:
    """Reserved bits of the pending debug exceptions must be 0."""
    tries = entries(l1)
    bits = (*range(4, 11), 13, 15, *range(17, 32)) if half == "low" else range(32, 64)
    expect_refused(tries, BAD_GUEST, each(_PENDING, [1 << bit for bit in bits]))


def _single_step(flags: int, blocking: int, pending: int, debugctl: int = 0) -> Changes:
    return {
        _RFLAGS: flags,
        _BLOCKING: blocking,
        _PENDING: pending,
        Field.GUEST_IA32_DEBUGCTL: debugctl,
    }


def test_single_step_while_blocked(l1: L1) -> None:
    """Under blocking by STI or MOV SS, with BTF 0, BS is pending exactly when RFLAGS.TF is 1."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(EntryCtl.LOAD_DEBUG_CONTROLS))
    step, bs = _IF_SET | Rflags.TF, int(PendingDebug.BS)
    bad = []
    for blocking in (_STI, _MOV_SS):
        bad += [
            _single_step(step, blocking, 0),
            _single_step(step, blocking, int(PendingDebug.B0)),
            _single_step(_IF_SET, blocking, bs),
        ]
    expect_refused(tries, BAD_GUEST, bad)


@pytest.mark.needs(Misc.ACTIVITY_HLT, PinCtl.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize(
    ("flags", "pending"),
    [(Rflags.TF, 0), (Rflags.TF, PendingDebug.B0), (0, PendingDebug.BS)],
    ids=["TF", "TF-B0", "BS"],
)
def test_single_step_in_the_hlt_state(l1: L1, flags: int, pending: int) -> None:
    """In the HLT state, with BTF 0, BS is pending exactly when RFLAGS.TF is 1."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(EntryCtl.LOAD_DEBUG_CONTROLS))
    # The timer ends the HLT state, should it begin.
    tries.vmcs.update(tries.using(PinCtl.ACTIVATE_PREEMPTION_TIMER))
    tries.vmcs.update({Field.VMX_PREEMPTION_TIMER_VALUE: 0, _STATE: ActivityState.HLT})
    assert tries(_single_step(_IF_SET | flags, 0, int(pending))) == BAD_GUEST


def test_branch_step_while_blocked(l1: L1) -> None:
    """Under blocking by STI or MOV SS, BS is not pending when TF and BTF are 1."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(EntryCtl.LOAD_DEBUG_CONTROLS))
    step, bs, btf = _IF_SET | Rflags.TF, int(PendingDebug.BS), int(DebugCtl.BTF)
    for blocking in (_STI, _MOV_SS):
        expect_refused(tries, BAD_GUEST, [_single_step(step, blocking, bs, btf)])
        expect_accepted(tries, [_single_step(step, blocking, 0, btf)])


def test_single_step_consistent(l1: L1) -> None:
    """A consistent single step under blocking by MOV SS waits until the next instruction."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(EntryCtl.LOAD_DEBUG_CONTROLS))
    step = 2 | Rflags.TF
    consistent = [
        _single_step(step, _MOV_SS, int(PendingDebug.BS)),
        _single_step(2, _MOV_SS, 0),
        _single_step(step, 0, 0),
    ]
    expect_accepted(tries, consistent)


def test_pending_rtm(l1: L1) -> None:
    """Bit 16 (RTM) needs a processor with RTM, bit 12 and no other bit, and no MOV SS blocking."""
    tries = entries(l1)
    rtm, enabled = int(PendingDebug.RTM), int(PendingDebug.ENABLED_BREAKPOINT)
    outcome = l1.cpuid(7)
    assert isinstance(outcome, Succeed)
    bad = [rtm, rtm | 1, rtm | enabled | 1, rtm | enabled | PendingDebug.BS]
    if not outcome.value[1] & 1 << 11:
        bad.append(rtm | enabled)
    expect_refused(tries, BAD_GUEST, each(_PENDING, bad))
    with_mov_ss = {_PENDING: rtm | enabled, _BLOCKING: _MOV_SS}
    expect_refused(tries, BAD_GUEST, [with_mov_ss])
