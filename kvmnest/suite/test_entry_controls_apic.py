"""VM entry checks the controls of APIC virtualization and posted interrupts: error 7."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import (
    BAD_CONTROL,
    BAD_GUEST,
    Entries,
    bad_pages,
    each,
    entries,
    expect_accepted,
    expect_refused,
)
from kvmnest.vmx import ExitCtl, ExitReason, Field, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("VM-Execution Control Fields")]

_VTPR = 0x80


def _with_tpr_shadow(l1: L1, vtpr: int = 0) -> Entries:
    """Make a VMCS with a TPR shadow in the page ``virtual_apic``, whose VTPR is given."""
    tries = entries(l1)
    l1.write_int(l1.sym("virtual_apic") + _VTPR, vtpr, 4)
    tries.vmcs.update(tries.using(ProcCtl.USE_TPR_SHADOW))
    tries.vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.sym("virtual_apic")
    tries.vmcs[Field.TPR_THRESHOLD] = 0
    return tries


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_virtual_apic_address(l1: L1) -> None:
    """The virtual-APIC address: page aligned, inside the width; ignored without TPR shadow."""
    tries = _with_tpr_shadow(l1)
    bad = bad_pages(l1, l1.sym("virtual_apic"))
    field = Field.VIRTUAL_APIC_PAGE_ADDR
    expect_refused(tries, BAD_CONTROL, each(field, bad))
    unused = tries.using(without=ProcCtl.USE_TPR_SHADOW)
    expect_accepted(tries, each(field, (bad[0], bad[-1]), unused))


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_tpr_threshold_reserved_bits(l1: L1) -> None:
    """Bits 31:4 of the TPR threshold must be 0."""
    tries = _with_tpr_shadow(l1, vtpr=0xF0)
    bad = [1 << bit for bit in range(4, 32)] + [0xFFFFFFFF]
    _expect_refused_without_harm(l1, tries, bad)
    expect_accepted(tries, each(Field.TPR_THRESHOLD, range(16)))


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_tpr_threshold_without_tpr_shadow(l1: L1) -> None:
    """The TPR threshold is ignored when there is no TPR shadow."""
    tries = entries(l1)
    expect_accepted(tries, each(Field.TPR_THRESHOLD, [0xF, 0x10, 0xFFFFFFFF]))


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_tpr_threshold_above_vtpr(l1: L1) -> None:
    """Without APIC-access virtualization the threshold must not exceed VTPR's bits 7:4."""
    tries = _with_tpr_shadow(l1, vtpr=0x5F)
    _expect_refused_without_harm(l1, tries, [6, 7, 15])
    expect_accepted(tries, each(Field.TPR_THRESHOLD, [0, 4, 5]))


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_tpr_threshold_with_inactive_secondary_controls(l1: L1) -> None:
    """Secondary controls count as 0 unless they are activated: the rule on VTPR holds."""
    tries = _with_tpr_shadow(l1, vtpr=0x5F)
    used = tries.using(without=ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    # EPT is off with them, which maps one to one.
    flags = Proc2Ctl.VIRTUALIZE_APIC_ACCESSES | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY
    for secondary in (0, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES, flags, 0xFFFFFFFF):
        fields = {**used, Field.SECONDARY_VM_EXEC_CONTROL: int(secondary)}
        expect_refused(tries, BAD_CONTROL, each(Field.TPR_THRESHOLD, [6, 15, 0x10], fields))
        expect_accepted(tries, each(Field.TPR_THRESHOLD, [0, 5], fields))


@pytest.mark.needs(
    ProcCtl.USE_TPR_SHADOW,
    PinCtl.EXTERNAL_INTERRUPT_EXITING,
    Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY,
)
def test_tpr_threshold_with_virtual_interrupt_delivery(l1: L1) -> None:
    """With virtual-interrupt delivery the threshold is not used, whatever it holds."""
    tries = _with_tpr_shadow(l1, vtpr=0x5F)
    flags = (PinCtl.EXTERNAL_INTERRUPT_EXITING, Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY)
    expect_accepted(tries, each(Field.TPR_THRESHOLD, [0, 5, 6, 15, 0x10], tries.using(*flags)))


def _expect_refused_without_harm(l1: L1, tries: Entries, thresholds: Iterable[int]) -> None:
    """L1 goes on with its control registers after each refusal.

    A hypervisor may leave these checks to the processor, and then has to undo a half-done entry.
    """
    state = [l1.read_cr(number) for number in (0, 3, 4)]
    expect_refused(tries, BAD_CONTROL, each(Field.TPR_THRESHOLD, thresholds))
    assert [l1.read_cr(number) for number in (0, 3, 4)] == state


@pytest.mark.sdm("VM Exits Induced by the TPR Threshold")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
def test_tpr_threshold_above_vtpr_with_apic_accesses(l1: L1) -> None:
    """With APIC-access virtualization it is no error but an exit right after the entry."""
    tries = _with_tpr_shadow(l1, vtpr=0x5F)
    tries.vmcs.update(tries.using(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES))
    tries.vmcs[Field.APIC_ACCESS_ADDR] = l1.sym("apic_access")
    rip = tries.vmcs[Field.GUEST_RIP]
    below = Exit(ExitReason.TPR_BELOW_THRESHOLD, qualification=0, rip=rip, intr_info=0, idt_info=0)
    assert tries({Field.TPR_THRESHOLD: 6}) == below
    expect_accepted(tries, [{Field.TPR_THRESHOLD: 5}])
    expect_refused(tries, BAD_CONTROL, [{Field.TPR_THRESHOLD: 0x10}])


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
def test_apic_access_address(l1: L1) -> None:
    """The APIC-access address: page aligned, inside the width; ignored when unused."""
    tries = entries(l1)
    bad = bad_pages(l1, l1.sym("apic_access"))
    field = Field.APIC_ACCESS_ADDR
    used = {field: l1.sym("apic_access"), **tries.using(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)}
    expect_refused(tries, BAD_CONTROL, each(field, bad, used))
    expect_accepted(tries, [used, {field: bad[0]}, {field: bad[-1]}])


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(flag, id=flag.name, marks=pytest.mark.needs(flag))
        for flag in (
            Proc2Ctl.VIRTUALIZE_X2APIC_MODE,
            Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
            Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY,
        )
    ],
)
def test_needs_the_tpr_shadow(l1: L1, flag: Proc2Ctl) -> None:
    """x2APIC mode, register virtualization and virtual-interrupt delivery need a TPR shadow."""
    tries = entries(l1)
    pin = PinCtl.EXTERNAL_INTERRUPT_EXITING
    expect_refused(tries, BAD_CONTROL, [tries.using(flag, pin)])
    shadow = tries.using(flag, pin, ProcCtl.USE_TPR_SHADOW)
    page = {Field.VIRTUAL_APIC_PAGE_ADDR: l1.sym("virtual_apic"), Field.TPR_THRESHOLD: 0}
    expect_accepted(tries, [{**shadow, **page}])


@pytest.mark.needs(
    ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES, Proc2Ctl.VIRTUALIZE_X2APIC_MODE
)
def test_x2apic_mode_excludes_apic_accesses(l1: L1) -> None:
    """ "Virtualize x2APIC mode" and "virtualize APIC accesses" together are refused."""
    tries = _with_tpr_shadow(l1)
    tries.vmcs[Field.APIC_ACCESS_ADDR] = l1.sym("apic_access")
    x2apic, access = Proc2Ctl.VIRTUALIZE_X2APIC_MODE, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES
    expect_refused(tries, BAD_CONTROL, [tries.using(x2apic | access)])
    expect_accepted(tries, [tries.using(x2apic), tries.using(access)])


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY)
def test_interrupt_delivery_needs_external_interrupt_exiting(l1: L1) -> None:
    """ "Virtual-interrupt delivery" without "external-interrupt exiting" is refused."""
    tries = _with_tpr_shadow(l1)
    flag = Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY
    expect_refused(tries, BAD_CONTROL, [tries.using(flag)])
    expect_accepted(tries, [tries.using(flag, PinCtl.EXTERNAL_INTERRUPT_EXITING)])


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY)
def test_tpr_threshold_with_interrupt_delivery(l1: L1) -> None:
    """With virtual-interrupt delivery the TPR threshold is not checked."""
    tries = _with_tpr_shadow(l1)
    delivery = tries.using(Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    expect_accepted(tries, each(Field.TPR_THRESHOLD, [0xF, 0x10, 0xFFFFFFFF], delivery))


def _posted(l1: L1) -> Entries:
    """Make a VMCS with everything that posted-interrupt processing needs."""
    tries = _with_tpr_shadow(l1)
    tries.vmcs.update(
        tries.using(
            PinCtl.PROCESS_POSTED_INTERRUPTS | PinCtl.EXTERNAL_INTERRUPT_EXITING,
            Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY,
            ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
        )
    )
    tries.vmcs[Field.POSTED_INTR_NV] = 0xF2
    tries.vmcs[Field.POSTED_INTR_DESC_ADDR] = l1.sym("posted_descriptor")
    return tries


@pytest.mark.needs(PinCtl.PROCESS_POSTED_INTERRUPTS)
def test_posted_interrupts_need_other_controls(l1: L1) -> None:
    """Posted interrupts need virtual-interrupt delivery and acknowledge-interrupt-on-exit."""
    tries = _posted(l1)
    refused = [
        tries.using(without=Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY),
        tries.using(without=ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT),
        tries.using(without=PinCtl.EXTERNAL_INTERRUPT_EXITING),
    ]
    expect_refused(tries, BAD_CONTROL, refused)


@pytest.mark.needs(PinCtl.PROCESS_POSTED_INTERRUPTS)
def test_posted_interrupt_vector_and_descriptor(l1: L1) -> None:
    """The notification vector has 8 bits; the descriptor is aligned to 64 bytes."""
    tries = _posted(l1)
    expect_refused(
        tries, BAD_CONTROL, each(Field.POSTED_INTR_NV, [1 << bit for bit in range(8, 16)])
    )
    page = l1.sym("posted_descriptor")
    bad = [address for address in bad_pages(l1, page) if address & 0x3F or address >> 32]
    expect_refused(tries, BAD_CONTROL, each(Field.POSTED_INTR_DESC_ADDR, bad))
    expect_accepted(tries, each(Field.POSTED_INTR_DESC_ADDR, [page + 0x40, page + 0xFC0]))


@pytest.mark.sdm("VM-Entry Control Fields")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_control_error_between_other_failures(l1: L1) -> None:
    """A refused TPR threshold leaves nothing behind, before and after a failure of L2's state."""
    tries = _with_tpr_shadow(l1)
    assert tries({Field.TPR_THRESHOLD: 0x20}) == BAD_CONTROL
    assert tries({Field.GUEST_RFLAGS: 0}) == BAD_GUEST
    assert tries({Field.TPR_THRESHOLD: 0x20}) == BAD_CONTROL
    assert tries({}) == tries.vmcall()
