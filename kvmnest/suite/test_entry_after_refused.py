"""VM entries that follow a refused one: nothing of the refused entry stays behind in L2.

KVM builds the guest state of an entry field by field and may leave at any of them; what it has
noted as done by then must be true for the next entry.
"""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.entries import BAD_GUEST, Entries, address_bits, entries
from kvmnest.suite.support.failures import OUTCOMES, Failure, broken
from kvmnest.vmx import Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Outcome, Succeed

pytestmark = [
    pytest.mark.series(16),
    pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State"),
]

_NEEDS = {Failure.TPR_THRESHOLD: (ProcCtl.USE_TPR_SHADOW,)}
CR3 = "GUEST_CR3"
FAILURES = [
    *(
        pytest.param(failure, id=failure.name, marks=pytest.mark.needs(*_NEEDS[failure]))
        if failure in _NEEDS
        else pytest.param(failure, id=failure.name)
        for failure in Failure
    ),
    pytest.param(None, id=CR3),
]
EPT = pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
UNRESTRICTED = pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)
MODES = [
    pytest.param(L2Mode.LONG, True, id="LONG-ept", marks=EPT),
    pytest.param(L2Mode.LONG, False, id="LONG-no-ept"),
    pytest.param(L2Mode.PROTECTED, True, id="PROTECTED-ept", marks=EPT),
    pytest.param(L2Mode.PROTECTED, False, id="PROTECTED-no-ept"),
    pytest.param(L2Mode.PAE, True, id="PAE-ept", marks=EPT),
    pytest.param(L2Mode.PAE, False, id="PAE-no-ept"),
    pytest.param(L2Mode.UNPAGED, True, id="UNPAGED", marks=UNRESTRICTED),
    pytest.param(L2Mode.REAL, True, id="REAL", marks=UNRESTRICTED),
]


def _refuse(tries: Entries, failure: Failure | None) -> None:
    """Make an entry that breaks a rule, and put the VMCS right again."""
    expected: Outcome = OUTCOMES[failure] if failure else BAD_GUEST
    if failure:
        changes = broken(tries, failure)
    else:
        physical, _ = address_bits(tries.l1)
        changes = {Field.GUEST_CR3: tries.vmcs[Field.GUEST_CR3] | 1 << physical}
    assert tries(changes) == expected


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("mode", "ept"), MODES)
def test_good_entry(l1: L1, mode: L2Mode, ept: bool, failure: Failure | None) -> None:
    """After a refused VMLAUNCH L2 starts as if it had not been, after a refused VMRESUME too."""
    tries = entries(l1, mode=mode, ept=ept)
    _refuse(tries, failure)
    assert tries({}) == tries.vmcall()
    _refuse(tries, failure)
    _refuse(tries, failure)
    assert tries({}) == tries.vmcall()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("mode", "ept"), MODES)
def test_other_vmcs(l1: L1, mode: L2Mode, ept: bool, failure: Failure | None) -> None:
    """An entry of another VMCS between the refused entry and the good one changes nothing."""
    first = entries(l1, mode=mode, ept=ept)
    _refuse(first, failure)
    first.vmcs.flush()
    l1.load_vmcs(l1.alloc())
    other = Entries(l1)
    assert other({}) == other.vmcall()
    other.vmcs.flush()
    assert l1.vmptrld(first.vmcs.address) == Succeed()
    assert first({}) == first.vmcall()
