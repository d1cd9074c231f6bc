"""VM entry checks the guest's MSRs, debug registers, descriptor tables, RIP and RFLAGS."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    BAD_PATS,
    Entries,
    address_bits,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
    not_canonical,
)
from kvmnest.vmx import (
    EntryCtl,
    ExitReason,
    Field,
    IntrType,
    Proc2Ctl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Succeed
from kvmnest.vmx.registers import PAT_RESET

pytestmark = [
    pytest.mark.series(14),
    pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs"),
]

_ALL = (1 << 64) - 1
_RFLAGS, _RIP = Field.GUEST_RFLAGS, Field.GUEST_RIP


# --- debug registers ---


@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_dr7(l1: L1) -> None:
    """Bits 63:32 of GUEST_DR7 must be 0, if the debug controls are loaded."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_DEBUG_CONTROLS)
    bad = flips(0x400, range(32, 64))
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_DR7, bad, load))
    expect_accepted(tries, each(Field.GUEST_DR7, [0, 0x400, 0x700], load))
    not_loaded = tries.using(without=EntryCtl.LOAD_DEBUG_CONTROLS)
    expect_accepted(tries, each(Field.GUEST_DR7, [bad[0], bad[-1], _ALL], not_loaded))


@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_debugctl(l1: L1) -> None:
    """Reserved bits of GUEST_IA32_DEBUGCTL must be 0, if the debug controls are loaded."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_DEBUG_CONTROLS)
    bad = [1 << bit for bit in (3, 4, 5, *range(16, 64))]
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_IA32_DEBUGCTL, bad, load))
    expect_accepted(tries, [{**load, Field.GUEST_IA32_DEBUGCTL: 0}])


@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_debugctl_not_loaded(l1: L1) -> None:
    """GUEST_IA32_DEBUGCTL is not checked when the debug controls are not loaded."""
    tries = entries(l1)
    not_loaded = tries.using(without=EntryCtl.LOAD_DEBUG_CONTROLS)
    values = [1 << 3, 1 << 16, 1 << 63, _ALL]
    expect_accepted(tries, each(Field.GUEST_IA32_DEBUGCTL, values, not_loaded))


#: Bit 14 of IA32_DEBUGCTL, and the quirk of KVM that lets it pass (KVM's documentation,
#: "KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM").
_FREEZE_IN_SMM, _ALLOW_FREEZE = 1 << 14, 1 << 10


@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS, Cap.DISABLE_QUIRKS2)
@pytest.mark.parametrize("quirk", [True, False], ids=["quirk", "no-quirk"])
def test_freeze_in_smm(l1: L1, quirk: bool) -> None:
    """KVM, which does not virtualize FREEZE_IN_SMM, lets it pass unless its quirk is disabled."""
    tries = entries(l1)
    cases = [
        {**tries.using(EntryCtl.LOAD_DEBUG_CONTROLS), Field.GUEST_IA32_DEBUGCTL: _FREEZE_IN_SMM}
    ]
    if quirk:
        expect_accepted(tries, cases)
        return
    if not l1.vm.check_extension(Cap.DISABLE_QUIRKS2) & _ALLOW_FREEZE:
        pytest.skip("this KVM has no such quirk")
    l1.enable_cap(Cap.DISABLE_QUIRKS2, _ALLOW_FREEZE)
    expect_refused(tries, BAD_GUEST, cases)


# --- MSRs ---


@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_sysenter_canonical(l1: L1, mode: L2Mode) -> None:
    """The SYSENTER addresses must be canonical, in every mode."""
    tries = entries(l1, mode=mode)
    top = 1 << address_bits(l1)[1] - 1
    for field in (Field.GUEST_SYSENTER_ESP, Field.GUEST_SYSENTER_EIP):
        expect_refused(tries, BAD_GUEST, each(field, not_canonical(l1)))
        expect_accepted(tries, each(field, [top - 1, _ALL ^ top - 1, _ALL]))


@pytest.mark.needs(EntryCtl.LOAD_PAT)
def test_pat(l1: L1) -> None:
    """GUEST_IA32_PAT holds memory types only, if it is loaded; otherwise it is not checked."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_PAT)
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_IA32_PAT, BAD_PATS, load))
    good = [PAT_RESET & ~(0xFF << 56) | kind << 56 for kind in (0, 1, 4, 5, 6, 7)]
    expect_accepted(tries, each(Field.GUEST_IA32_PAT, good, load))
    expect_accepted(tries, each(Field.GUEST_IA32_PAT, [*BAD_PATS[:3], _ALL]))


@pytest.mark.needs(EntryCtl.LOAD_PERF_GLOBAL_CTRL)
def test_perf_global_ctrl(l1: L1) -> None:
    """GUEST_IA32_PERF_GLOBAL_CTRL sets no bit of a counter that does not exist, if loaded."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_PERF_GLOBAL_CTRL)
    outcome = l1.cpuid(0xA)
    assert isinstance(outcome, Succeed)
    eax, _, _, edx = outcome.value
    general, fixed = (eax >> 8 & 0xFF, edx & 0x1F) if eax & 0xFF > 1 else (0, 0)
    bad = [1 << bit for bit in (*range(general, 32), *range(32 + fixed, 48), *range(52, 64))]
    field = Field.GUEST_IA32_PERF_GLOBAL_CTRL
    expect_refused(tries, BAD_GUEST, each(field, bad, load))
    expect_accepted(tries, [{**load, field: 0}, {field: bad[0]}, {field: _ALL}])


@pytest.mark.needs(EntryCtl.LOAD_BNDCFGS)
def test_bndcfgs(l1: L1) -> None:
    """GUEST_BNDCFGS: bits 11:2 are 0 and the address is canonical, if it is loaded."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_BNDCFGS)
    bad = [1 << bit for bit in range(2, 12)] + [value & ~0xFFF for value in not_canonical(l1)]
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_BNDCFGS, bad, load))
    expect_accepted(tries, each(Field.GUEST_BNDCFGS, bad))


@pytest.mark.needs(EntryCtl.LOAD_PKRS)
def test_pkrs(l1: L1) -> None:
    """Bits 63:32 of GUEST_IA32_PKRS must be 0, if it is loaded."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_PKRS)
    bad = [1 << bit for bit in range(32, 64)]
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_IA32_PKRS, bad, load))


# --- descriptor tables ---


@pytest.mark.sdm("Checks on Guest Descriptor-Table Registers")
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_descriptor_table(l1: L1, mode: L2Mode) -> None:
    """GDTR and IDTR: canonical base, limit of at most FFFFH, in every mode."""
    tries = entries(l1, mode=mode)
    top = 1 << address_bits(l1)[1] - 1
    for table in ("GDTR", "IDTR"):
        base, limit = Field[f"GUEST_{table}_BASE"], Field[f"GUEST_{table}_LIMIT"]
        bad = [{base: value} for value in not_canonical(l1)]
        bad += [{limit: 0xFFFF | 1 << bit} for bit in range(16, 32)]
        expect_refused(tries, BAD_GUEST, bad)
        good = [{base: value} for value in (0, top - 1, _ALL ^ top - 1, _ALL)]
        expect_accepted(tries, [*good, {limit: 0}, {limit: 0xFFFF}])


# --- RIP ---


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
def test_rip_64_bit(l1: L1) -> None:
    """In 64-bit mode the bits of RIP beyond the linear-address width must be equal."""
    tries = entries(l1)
    rip, linear = tries.vmcs[_RIP], address_bits(l1)[1]
    low = [rip | 1 << bit for bit in range(linear, 64)]
    high = [_ALL ^ 1 << bit for bit in range(linear, 64)]
    expect_refused(tries, BAD_GUEST, each(_RIP, low + high))


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
def test_rip_64_bit_not_canonical(l1: L1) -> None:
    """RIP may be just beyond the canonical addresses: then the first fetch in L2 faults."""
    tries = entries(l1)
    for rip in (1 << address_bits(l1)[1] - 1, _ALL ^ 1 << address_bits(l1)[1] - 1):
        assert tries({_RIP: rip}) == Exit(ExitReason.VMCALL), hex(rip)
        assert l1.l2_frame(3) == [Vector.GP, 0, rip]
        tries.vmcs[Field.GUEST_RSP] = tries.vmcs.baseline[Field.GUEST_RSP]
        tries.vmcs[_RFLAGS] = 2


def _in_compatibility_mode(l1: L1) -> Entries:
    tries = entries(l1, l2="l2_vmcall32")
    tries.vmcs[Field.GUEST_CS_SELECTOR] = l1.sym("SEL_CODE32")
    tries.vmcs[Field.GUEST_CS_ACCESS_RIGHTS] = 0xC09B
    return tries


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
@pytest.mark.parametrize("mode", ["compatibility", "32-bit"])
def test_rip_outside_64_bit_mode(l1: L1, mode: str) -> None:
    """Outside 64-bit mode, compatibility mode included, bits 63:32 of RIP must be 0."""
    long_mode = mode == "compatibility"
    tries = _in_compatibility_mode(l1) if long_mode else entries(l1, mode=L2Mode.PROTECTED)
    rip = tries.vmcs[_RIP]
    bad = [rip | 1 << bit for bit in range(32, 64)] + [rip | 0xFFFFFFFF << 32]
    expect_refused(tries, BAD_GUEST, each(_RIP, bad))


# --- RFLAGS ---


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_rflags_reserved_bits(l1: L1, mode: L2Mode) -> None:
    """Bits 63:22, 15, 5 and 3 of RFLAGS must be 0 and bit 1 must be 1."""
    tries = entries(l1, mode=mode)
    bad = flips(2, [1, 3, 5, 15, *range(22, 64)])
    expect_refused(tries, BAD_GUEST, each(_RFLAGS, [*bad, 0, _ALL]))
    defined = 0x3F7FD7 & ~int(Rflags.VM | Rflags.TF)
    alone = [2 | 1 << bit for bit in range(22) if defined >> bit & 1]
    expect_accepted(tries, each(_RFLAGS, [*alone, defined]))


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
def test_rflags_vm_in_ia32e_mode(l1: L1) -> None:
    """RFLAGS.VM must be 0 in IA-32e mode, with segments fit for virtual-8086 mode, too."""
    tries = entries(l1)
    bad = 2 | Rflags.VM
    expect_refused(tries, BAD_GUEST, [{_RFLAGS: bad}, {_RFLAGS: bad | Rflags.IOPL}])


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)
def test_rflags_vm_in_real_mode(l1: L1) -> None:
    """RFLAGS.VM must be 0 when CR0.PE is 0."""
    tries = entries(l1, mode=L2Mode.REAL)
    segments = {}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        segments[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xF3
    expect_refused(tries, BAD_GUEST, [{_RFLAGS: 2 | Rflags.VM, **segments}])
    expect_refused(tries, BAD_GUEST, [{_RFLAGS: 2 | Rflags.VM}])


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_external_interrupt_needs_if(l1: L1, mode: L2Mode) -> None:
    """RFLAGS.IF must be 1 when an external interrupt is injected; for nothing else."""
    tries = entries(l1, mode=mode)
    info = Field.VM_ENTRY_INTR_INFO_FIELD
    interrupts = [intr_info(v, IntrType.EXTERNAL_INTERRUPT) for v in (0, 2, 13, 32, 255)]
    for flags in (2, 2 | Rflags.CF | Rflags.OF, 2 | Rflags.IOPL):
        expect_refused(tries, BAD_GUEST, each(info, interrupts, {_RFLAGS: flags}))
    tries.vmcs[Field.VM_ENTRY_INSTRUCTION_LEN] = 1
    others = [
        intr_info(32, IntrType.SOFTWARE_INTERRUPT),
        intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION),
        intr_info(2, IntrType.NMI),
    ]
    for event in others:
        assert tries({info: event, _RFLAGS: 2}) == Exit(ExitReason.VMCALL), hex(event)
        tries.vmcs.update(
            {
                field: tries.vmcs.baseline[field]
                for field in (_RIP, Field.GUEST_RSP, Field.GUEST_INTERRUPTIBILITY_INFO)
            }
        )
