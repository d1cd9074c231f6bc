"""The order of the checks on VM entry, and which failure is reported of several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmnest.l1 import L1, Shadow
from kvmnest.suite.support.entries import entries, expect_accepted
from kvmnest.suite.support.failures import OUTCOMES, STAGES, Failure, broken
from kvmnest.vmx import ExitReason, Field, ProcCtl, VmxError
from kvmnest.vmx.outcome import Exit, VMfailInvalid, VMfailValid

pytestmark = [pytest.mark.series(16), pytest.mark.sdm("VM Entries")]


def _marked(*failures: Failure) -> tuple[pytest.MarkDecorator, ...]:
    needs = Failure.TPR_THRESHOLD in failures
    return (pytest.mark.needs(ProcCtl.USE_TPR_SHADOW),) if needs else ()


def _pairs(apart: bool) -> Iterator[object]:
    """Pairs of failures of different stages (the earlier first), or of the same stage."""
    for first in Failure:
        for second in Failure:
            ordered = STAGES[first] < STAGES[second]
            same = STAGES[first] == STAGES[second] and first.name < second.name
            if ordered if apart else same:
                name = f"{first.name}-{second.name}"
                yield pytest.param(first, second, id=name, marks=_marked(first, second))


@pytest.mark.parametrize(("first", "second"), list(_pairs(apart=True)))
def test_earlier_stage_wins(l1: L1, first: Failure, second: Failure) -> None:
    """Controls and host state come before guest state, and that before the MSR-load area."""
    tries = entries(l1)
    assert tries({**broken(tries, first), **broken(tries, second)}) == OUTCOMES[first]
    assert tries(broken(tries, second)) == OUTCOMES[second]
    expect_accepted(tries, [{}])


@pytest.mark.parametrize(("first", "second"), list(_pairs(apart=False)))
def test_same_stage(l1: L1, first: Failure, second: Failure) -> None:
    """Inside a stage (controls and host state are one) any of the failures may be reported."""
    tries = entries(l1)
    outcome = tries({**broken(tries, first), **broken(tries, second)})
    assert outcome in (OUTCOMES[first], OUTCOMES[second])
    expect_accepted(tries, [{}])


def test_everything_wrong(l1: L1) -> None:
    """Of failures of all stages a control's or the host state's is reported."""
    tries = entries(l1)
    wanted = [failure for failure in Failure if failure is not Failure.TPR_THRESHOLD]
    changes: dict[Field, int] = {}
    for failure in wanted:
        changes |= broken(tries, failure)
    assert tries(changes) in (OUTCOMES[Failure.CONTROL], OUTCOMES[Failure.HOST])
    expect_accepted(tries, [{}])


@pytest.mark.sdm("VMLAUNCH/VMRESUME")
@pytest.mark.parametrize("failure", [Failure.CONTROL, Failure.HOST, Failure.GUEST_RFLAGS])
def test_launch_state_comes_first(l1: L1, failure: Failure) -> None:
    """The launch state is looked at before any field: errors 4 and 5 win."""
    tries = entries(l1)
    vmcs = tries.vmcs
    wrong = broken(tries, failure)
    right = {field: vmcs[field] for field in wrong}
    vmcs.update(wrong)
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    vmcs.update(right)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    vmcs.update(wrong)
    assert l1.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
    vmcs.update(right)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMLAUNCH/VMRESUME")
@pytest.mark.parametrize("failure", [Failure.CONTROL, Failure.HOST, Failure.GUEST_RFLAGS])
def test_mov_ss_comes_first(l1: L1, failure: Failure) -> None:
    """Blocking by MOV SS is looked at before any field: error 26 wins."""
    tries = entries(l1)
    vmcs = tries.vmcs
    wrong = broken(tries, failure)
    right = {field: vmcs[field] for field in wrong}
    vmcs.update(wrong)
    blocked = VMfailValid(VmxError.ENTRY_EVENTS_BLOCKED_BY_MOV_SS)
    assert l1.vmlaunch(shadow=Shadow.MOV_SS) == blocked
    assert l1.vmlaunch() == OUTCOMES[failure]
    vmcs.update(right)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMLAUNCH/VMRESUME")
def test_no_current_vmcs_comes_first(l1: L1) -> None:
    """After VMCLEAR of a VMCS with errors there is none to check: VMfailInvalid."""
    tries = entries(l1)
    tries.vmcs.update(broken(tries, Failure.CONTROL))
    tries.vmcs.flush()
    l1.vmclear(tries.vmcs.address)
    assert l1.vmlaunch() == VMfailInvalid()
    assert l1.vmresume() == VMfailInvalid()
