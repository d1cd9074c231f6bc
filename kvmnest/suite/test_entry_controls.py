"""VM entry checks the VM-execution, VM-exit and VM-entry control words: error 7."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.batch import Changes
from kvmnest.suite.support.entries import (
    BAD_CONTROL,
    Entries,
    bad_pages,
    each,
    entries,
    expect_accepted,
    expect_refused,
)
from kvmnest.vmx import EntryCtl, ExitCtl, ExitReason, Field, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.control_fields import FIELD_OF
from kvmnest.vmx.outcome import Exit

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("VM-Execution Control Fields")]


def _changed_bits(tries: Entries, kind: type[enum.IntFlag]) -> tuple[list[int], list[int]]:
    """Values of a control word with one bit wrong: a must-be-1 bit 0, a must-be-0 bit 1."""
    caps, field = tries.l1.caps, FIELD_OF[kind]
    value = tries.vmcs.fields()[field]
    must, may = caps.must_be_one(kind), caps.may_be_one(kind)
    cleared = [value & ~(1 << bit) for bit in range(32) if must >> bit & 1]
    extra = [value | 1 << bit for bit in range(32) if not may >> bit & 1]
    return cleared, extra


# --- reserved bits ---


@pytest.mark.parametrize(
    "kind",
    [
        PinCtl,
        ProcCtl,
        Proc2Ctl,
        pytest.param(ExitCtl, marks=pytest.mark.sdm("VM-Exit Control Fields")),
        pytest.param(EntryCtl, marks=pytest.mark.sdm("VM-Entry Control Fields")),
    ],
    ids=lambda kind: kind.__name__,
)
def test_reserved_bits(l1: L1, kind: type[enum.IntFlag]) -> None:
    """A bit that the capability MSR does not allow at its value is refused, one at a time."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(Proc2Ctl(0)))
    cleared, extra = _changed_bits(tries, kind)
    assert cleared or kind is Proc2Ctl
    expect_refused(tries, BAD_CONTROL, each(FIELD_OF[kind], cleared + extra))


@pytest.mark.parametrize("kind", [PinCtl, ProcCtl, ExitCtl, EntryCtl], ids=lambda k: k.__name__)
def test_all_bits_at_once(l1: L1, kind: type[enum.IntFlag]) -> None:
    """Words of all zeros and all ones are refused."""
    tries = entries(l1)
    expect_refused(tries, BAD_CONTROL, each(FIELD_OF[kind], [0, 0xFFFFFFFF]))


def test_secondary_controls_need_their_activation(l1: L1) -> None:
    """With "activate secondary controls" 0 the secondary word counts as 0, whatever it holds."""
    tries = entries(l1, ept=False)
    off = tries.using(without=ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    on = tries.using(ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    everything = {Field.SECONDARY_VM_EXEC_CONTROL: 0xFFFFFFFF}
    expect_accepted(tries, [{**off, **everything}])
    expect_refused(tries, BAD_CONTROL, [{**on, **everything}])


def _alone(tries: Entries) -> Iterator[Changes]:
    """Each supported control that needs no other one and does not make this L2 exit."""
    l1 = tries.l1
    needs_more = {
        *(PinCtl.VIRTUAL_NMIS, PinCtl.PROCESS_POSTED_INTERRUPTS),
        *(ProcCtl.NMI_WINDOW_EXITING, ProcCtl.USE_IO_BITMAPS, ProcCtl.USE_MSR_BITMAPS),
        *(ProcCtl.USE_TPR_SHADOW, ProcCtl.MONITOR_TRAP_FLAG, ProcCtl.ACTIVATE_TERTIARY_CONTROLS),
        *(ExitCtl.SAVE_PREEMPTION_TIMER, ExitCtl.ACTIVATE_SECONDARY_CONTROLS),
        *(EntryCtl.ENTRY_TO_SMM, EntryCtl.DEACTIVATE_DUAL_MONITOR, EntryCtl.LOAD_FRED),
    }
    for kind in (PinCtl, ProcCtl, ExitCtl, EntryCtl):
        for flag in kind:
            if flag not in needs_more and l1.caps.supports(flag):
                yield tries.using(flag)
    plain = (
        *(Proc2Ctl.DESCRIPTOR_TABLE_EXITING, Proc2Ctl.ENABLE_RDTSCP, Proc2Ctl.WBINVD_EXITING),
        *(Proc2Ctl.RDRAND_EXITING, Proc2Ctl.RDSEED_EXITING, Proc2Ctl.ENABLE_INVPCID),
        *(Proc2Ctl.PAUSE_LOOP_EXITING, Proc2Ctl.ENABLE_XSAVES),
    )
    yield from (tries.using(flag) for flag in plain if l1.caps.supports(flag))


def test_supported_controls_are_accepted(l1: L1) -> None:
    """Each supported control that depends on nothing else is accepted by itself."""
    tries = entries(l1)
    tries.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0xFFFFFFFF
    tries.vmcs.flush()
    expect_accepted(tries, _alone(tries))


def test_default_settings_are_accepted(l1: L1) -> None:
    """The old capability MSRs' default1 bits may all be 1, the TRUE ones' all be 0."""
    tries = entries(l1)
    defaults = {PinCtl: 0x16, ProcCtl: 0x0401E172, ExitCtl: 0x36DFF, EntryCtl: 0x11FF}
    known = tries.vmcs.fields()
    for kind, bits in defaults.items():
        assert bits & ~l1.caps.may_be_one(kind) == 0, kind.__name__
        expect_accepted(tries, [{FIELD_OF[kind]: known[FIELD_OF[kind]] | bits}])


# --- CR3 targets ---


def test_cr3_target_count(l1: L1) -> None:
    """The CR3-target count must not exceed what IA32_VMX_MISC reports."""
    tries = entries(l1)
    most = l1.caps.misc.cr3_targets
    too_many = [most + 1, most + 2, 0x100, 0x10000, 1 << 31, 0xFFFFFFFF]
    expect_refused(tries, BAD_CONTROL, each(Field.CR3_TARGET_COUNT, too_many))
    expect_accepted(tries, each(Field.CR3_TARGET_COUNT, range(most + 1)))


# --- bitmaps ---


@pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)
@pytest.mark.parametrize("field", [Field.IO_BITMAP_A, Field.IO_BITMAP_B], ids=lambda f: f.name)
def test_io_bitmap_address(l1: L1, field: Field) -> None:
    """I/O bitmap addresses: page aligned, inside the physical width; ignored when unused."""
    tries = entries(l1)
    bad = bad_pages(l1, l1.sym(field.name.lower()))
    used = {
        Field.IO_BITMAP_A: l1.sym("io_bitmap_a"),
        Field.IO_BITMAP_B: l1.sym("io_bitmap_b"),
        **tries.using(ProcCtl.USE_IO_BITMAPS),
    }
    expect_refused(tries, BAD_CONTROL, each(field, bad, used))
    expect_accepted(tries, [used, {field: bad[0]}, {field: bad[-1]}])


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_msr_bitmap_address(l1: L1) -> None:
    """The MSR-bitmap address: page aligned, inside the physical width; ignored when unused."""
    tries = entries(l1)
    bad = bad_pages(l1, l1.sym("msr_bitmap"))
    used = {Field.MSR_BITMAP: l1.sym("msr_bitmap"), **tries.using(ProcCtl.USE_MSR_BITMAPS)}
    expect_refused(tries, BAD_CONTROL, each(Field.MSR_BITMAP, bad, used))
    expect_accepted(tries, [used, {Field.MSR_BITMAP: bad[0]}, {Field.MSR_BITMAP: bad[-1]}])


@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
@pytest.mark.parametrize("field", [Field.VMREAD_BITMAP, Field.VMWRITE_BITMAP], ids=lambda f: f.name)
def test_shadowing_bitmap_address(l1: L1, field: Field) -> None:
    """VMREAD and VMWRITE bitmaps: page aligned, inside the width; ignored when unused."""
    tries = entries(l1)
    bad = bad_pages(l1, l1.sym(field.name.lower()))
    used = {
        Field.VMREAD_BITMAP: l1.sym("vmread_bitmap"),
        Field.VMWRITE_BITMAP: l1.sym("vmwrite_bitmap"),
        **tries.using(Proc2Ctl.VMCS_SHADOWING),
    }
    expect_refused(tries, BAD_CONTROL, each(field, bad, used))
    expect_accepted(tries, [used, {field: bad[0]}, {field: bad[-1]}])


# --- NMI, VPID, timer ---


@pytest.mark.needs(PinCtl.VIRTUAL_NMIS)
def test_virtual_nmis_need_nmi_exiting(l1: L1) -> None:
    """ "Virtual NMIs" without "NMI exiting" is refused."""
    tries = entries(l1)
    expect_refused(tries, BAD_CONTROL, [tries.using(PinCtl.VIRTUAL_NMIS)])
    expect_accepted(tries, [tries.using(PinCtl.VIRTUAL_NMIS | PinCtl.NMI_EXITING)])


@pytest.mark.needs(PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
def test_nmi_window_needs_virtual_nmis(l1: L1) -> None:
    """ "NMI-window exiting" without "virtual NMIs" is refused."""
    tries = entries(l1)
    window, virtual = ProcCtl.NMI_WINDOW_EXITING, PinCtl.VIRTUAL_NMIS | PinCtl.NMI_EXITING
    refused = [tries.using(window), tries.using(window, PinCtl.NMI_EXITING)]
    expect_refused(tries, BAD_CONTROL, refused)
    rip = tries.vmcs[Field.GUEST_RIP]
    open_at_once = Exit(ExitReason.NMI_WINDOW, qualification=0, rip=rip, intr_info=0, idt_info=0)
    assert tries(tries.using(window, virtual)) == open_at_once


@pytest.mark.needs(Proc2Ctl.ENABLE_VPID)
def test_vpid_zero(l1: L1) -> None:
    """VPID 0 is the host's: refused when VPIDs are enabled, ignored otherwise."""
    tries = entries(l1)
    vpids = tries.using(Proc2Ctl.ENABLE_VPID)
    field = Field.VIRTUAL_PROCESSOR_ID
    expect_refused(tries, BAD_CONTROL, [{**vpids, field: 0}])
    expect_accepted(tries, [{field: 0}, *each(field, [1, 2, 0xFFFF], vpids)])


@pytest.mark.sdm("VM-Exit Control Fields")
@pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER, ExitCtl.SAVE_PREEMPTION_TIMER)
def test_saving_the_preemption_timer_needs_it(l1: L1) -> None:
    """ "Save VMX-preemption timer value" is refused unless the timer is activated."""
    tries = entries(l1)
    tries.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0xFFFFFFFF
    save, timer = ExitCtl.SAVE_PREEMPTION_TIMER, PinCtl.ACTIVATE_PREEMPTION_TIMER
    expect_refused(tries, BAD_CONTROL, [tries.using(save)])
    expect_accepted(tries, [tries.using(timer), tries.using(save, timer)])


# --- SMM ---


@pytest.mark.sdm("VM-Entry Control Fields")
@pytest.mark.parametrize(
    "flag", [EntryCtl.ENTRY_TO_SMM, EntryCtl.DEACTIVATE_DUAL_MONITOR], ids=lambda f: f.name
)
def test_smm_controls_outside_smm(l1: L1, flag: EntryCtl) -> None:
    """Outside SMM the two SMM controls must be 0, even where the capability MSR allows them."""
    tries = entries(l1)
    both = EntryCtl.ENTRY_TO_SMM | EntryCtl.DEACTIVATE_DUAL_MONITOR
    expect_refused(tries, BAD_CONTROL, [tries.using(flag), tries.using(both)])
