"""Rules about the guest-state area, in each mode of the guest."""

from collections.abc import Callable

import pytest
from vmx_example import baseline, capabilities, legacy_guest, real_mode_guest, v8086_guest

from kvmnest.vmx import (
    AccessRights,
    ActivityState,
    CpuFeatures,
    Cr0,
    Cr4,
    DebugCtl,
    Efer,
    EntryCtl,
    Field,
    Interruptibility,
    IntrType,
    PendingDebug,
    PinCtl,
    Proc2Ctl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.rules import EntryContext, Stage, check

F = Field
Change = dict[Field, "int | tuple[int, int]"]
CAPS = capabilities(cpu=CpuFeatures(physical_bits=46, rtm=True, bus_lock_trap=False))
INFO, STATE = F.VM_ENTRY_INTR_INFO_FIELD, F.GUEST_ACTIVITY_STATE
BLOCK, PENDING = F.GUEST_INTERRUPTIBILITY_INFO, F.GUEST_PENDING_DBG_EXCEPTIONS
CS, SS, DS, FS, TR, LDTR = (
    F[f"GUEST_{name}_ACCESS_RIGHTS"] for name in ("CS", "SS", "DS", "FS", "TR", "LDTR")
)
BAD = 1 << 47
IF, TF = int(Rflags.IF | 2), int(Rflags.TF | 2)
NMI = intr_info(2, IntrType.NMI)
IRQ = intr_info(0x20, IntrType.EXTERNAL_INTERRUPT)
LDT = int(AccessRights(type=2, s=0))
CODE, DATA = 0xA09B, 0xC093


def long_guest(vmcs: dict[Field, int]) -> dict[Field, int]:
    return dict(vmcs)


# A tuple is (bits to set, bits to clear), a number the whole value.
LONG: list[tuple[Change, str]] = [
    ({F.GUEST_CR0: (0, Cr0.NE)}, "CR0: NE must be 1"),
    ({F.GUEST_CR0: (1 << 40, 0)}, "CR0: 0x10000000000 must be 0"),
    ({F.GUEST_CR4: (Cr4.KL, 0)}, "CR4: KL must be 0"),
    ({F.GUEST_CR4: (0, Cr4.PAE)}, "IA-32e mode needs CR4.PAE"),
    ({F.GUEST_CR3: 1 << 46}, "CR3 must not exceed the physical-address width"),
    ({F.GUEST_IA32_DEBUGCTL: 1 << 20}, "IA32_DEBUGCTL must not set reserved bits"),
    ({F.GUEST_DR7: 1 << 32}, "bits 63:32 of DR7 must be 0"),
    ({F.GUEST_IA32_EFER: 0x502}, "IA32_EFER must not set reserved bits"),
    ({F.GUEST_IA32_EFER: Efer.LMA}, "IA32_EFER.LMA must equal LME with CR0.PG"),
    ({F.GUEST_IA32_EFER: 0}, "IA32_EFER.LMA must equal IA32E_MODE_GUEST"),
    ({F.GUEST_SYSENTER_ESP: BAD}, "the address must be canonical"),
    (
        {F.VM_ENTRY_CONTROLS: (EntryCtl.LOAD_PAT, 0), F.GUEST_IA32_PAT: 3},
        "each byte of IA32_PAT must be a memory type",
    ),
    (
        {
            F.VM_ENTRY_CONTROLS: (EntryCtl.LOAD_PERF_GLOBAL_CTRL, 0),
            F.GUEST_IA32_PERF_GLOBAL_CTRL: 1 << 60,
        },
        "IA32_PERF_GLOBAL_CTRL must not set reserved bits",
    ),
    ({F.GUEST_GDTR_BASE: BAD}, "the base must be canonical"),
    ({F.GUEST_IDTR_LIMIT: 0x10000}, "bits 31:16 of the limit must be 0"),
    ({F.GUEST_RIP: 1 << 48}, "bits 63:48 of RIP must be equal"),
    ({F.GUEST_RFLAGS: 0}, "bit 1 of RFLAGS must be 1"),
    ({F.GUEST_RFLAGS: 2 | 1 << 22}, "bits 63:22, 15, 5 and 3 of RFLAGS must be 0"),
    ({F.GUEST_RFLAGS: 2 | 1 << 15}, "bits 63:22, 15, 5 and 3 of RFLAGS must be 0"),
    ({INFO: IRQ}, "injecting an external interrupt needs RFLAGS.IF"),
    ({F.GUEST_TR_SELECTOR: 4}, "TR: TI of the selector must be 0"),
    ({LDTR: LDT, F.GUEST_LDTR_SELECTOR: 4}, "LDTR: TI of the selector must be 0"),
    ({F.GUEST_CS_SELECTOR: 9}, "SS: RPL must equal the RPL of CS"),
    ({F.GUEST_FS_BASE: BAD}, "FS: base must be canonical"),
    ({F.GUEST_TR_BASE: BAD}, "TR: base must be canonical"),
    ({LDTR: LDT, F.GUEST_LDTR_BASE: BAD}, "LDTR: base must be canonical"),
    ({F.GUEST_CS_BASE: 1 << 32}, "CS: bits 63:32 of the base must be 0"),
    ({F.GUEST_ES_BASE: 1 << 32}, "ES: bits 63:32 of the base must be 0"),
    ({CS: CODE & ~1}, "CS: type must be one of 9, 11, 13, 15"),
    ({CS: CODE & ~1 << 0 & ~8 | 1}, "CS: type must be one of 9, 11, 13, 15"),
    ({CS: CODE | 3 << 5}, "CS: DPL of non-conforming code must equal the DPL of SS"),
    ({CS: CODE | 4 | 1 << 5}, "CS: DPL of conforming code must not exceed the DPL of SS"),
    ({CS: CODE & ~0x10}, "CS: S must be 1"),
    ({CS: CODE & ~0x80}, "CS: P must be 1"),
    ({CS: CODE | 1 << 9}, "CS: bits 31:17 and 11:8 of the access rights must be 0"),
    ({CS: CODE | 1 << 31}, "CS: bits 31:17 and 11:8 of the access rights must be 0"),
    ({CS: CODE | 1 << 14}, "CS: D/B must be 0 when L is 1 in IA-32e mode"),
    ({F.GUEST_CS_LIMIT: 0xFFFFFFFE}, "CS: G must be 0 unless bits 11:0 of the limit are 1"),
    ({CS: CODE & ~0x8000}, "CS: G must be 1 when the limit has bits 31:20"),
    ({SS: DATA & ~1}, "SS: type must be 3 or 7"),
    ({SS: DATA | 8}, "SS: type must be 3 or 7"),
    ({SS: DATA & ~0x80}, "SS: P must be 1"),
    ({DS: DATA & ~1}, "DS: the accessed bit must be 1"),
    ({DS: DATA & ~2 | 8}, "DS: a code segment must be readable"),
    ({F.GUEST_DS_SELECTOR: 3}, "DS: DPL must not be below the RPL of the selector"),
    ({FS: DATA & ~0x10}, "FS: S must be 1"),
    ({TR: 0x83}, "TR: type must be 11"),
    ({TR: 0x89}, "TR: type must be 11"),
    ({TR: 0x8B | 1 << 16}, "TR: must be usable"),
    ({TR: 0x9B}, "TR: S must be 0"),
    ({TR: 0x0B}, "TR: P must be 1"),
    ({F.GUEST_TR_LIMIT: 0x100000}, "TR: G must be 1 when the limit has bits 31:20"),
    ({LDTR: 0x83}, "LDTR: type must be 2"),
    ({LDTR: 0x02}, "LDTR: P must be 1"),
    ({STATE: 4}, "activity state 4 is not supported"),
    ({STATE: ActivityState.SHUTDOWN}, "activity state 2 is not supported"),
    (
        {STATE: 1, BLOCK: 1, F.GUEST_RFLAGS: IF},
        "blocking by STI or MOV SS needs the active state",
    ),
    (
        {STATE: ActivityState.HLT, INFO: intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION)},
        "the event cannot be injected in this activity state",
    ),
    (
        {STATE: ActivityState.WAIT_FOR_SIPI, INFO: NMI},
        "the event cannot be injected in this activity state",
    ),
    ({BLOCK: 1 << 5}, "bits 31:5 of the interruptibility state must be 0"),
    ({BLOCK: 3, F.GUEST_RFLAGS: IF}, "blocking by STI and by MOV SS exclude each other"),
    ({BLOCK: 1}, "blocking by STI needs RFLAGS.IF"),
    ({BLOCK: Interruptibility.SMI}, "blocking by SMI must be 0 outside SMM"),
    ({BLOCK: Interruptibility.ENCLAVE}, "enclave interruption needs SGX"),
    (
        {BLOCK: 1, INFO: IRQ, F.GUEST_RFLAGS: IF},
        "an external interrupt cannot be injected under blocking by STI or MOV SS",
    ),
    ({BLOCK: 2, INFO: NMI}, "an NMI cannot be injected under blocking by MOV SS"),
    (
        {
            BLOCK: 8,
            INFO: NMI,
            F.PIN_BASED_VM_EXEC_CONTROL: (PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS, 0),
        },
        "an NMI cannot be injected under blocking by NMI with virtual NMIs",
    ),
    ({PENDING: 1 << 4}, "reserved bits of pending debug exceptions must be 0"),
    ({PENDING: PendingDebug.BLD}, "reserved bits of pending debug exceptions must be 0"),
    (
        {BLOCK: 2, F.GUEST_RFLAGS: TF},
        "BS of pending debug exceptions must be 1 (RFLAGS.TF with IA32_DEBUGCTL.BTF 0)",
    ),
    (
        {STATE: 1, PENDING: PendingDebug.BS},
        "BS of pending debug exceptions must be 0 (RFLAGS.TF with IA32_DEBUGCTL.BTF 0)",
    ),
    (
        {
            BLOCK: 2,
            F.GUEST_RFLAGS: TF,
            PENDING: PendingDebug.BS,
            F.GUEST_IA32_DEBUGCTL: DebugCtl.BTF,
        },
        "BS of pending debug exceptions must be 0 (RFLAGS.TF with IA32_DEBUGCTL.BTF 0)",
    ),
    ({PENDING: PendingDebug.RTM}, "RTM of pending debug exceptions needs bit 12"),
]

LEGACY: list[tuple[Change, str]] = [
    ({F.GUEST_RIP: 1 << 32}, "bits 63:32 of RIP must be 0 outside 64-bit mode"),
    ({F.GUEST_CR4: (Cr4.PCIDE, 0)}, "CR4.PCIDE needs IA-32e mode"),
    ({F.GUEST_IA32_EFER: Efer.LME}, "IA32_EFER.LMA must equal LME with CR0.PG"),
    ({TR: 0x81}, "TR: type must be 3 or 11"),
    ({SS: DATA | 3 << 5, CS: 0xC09B | 3 << 5}, "SS: DPL must equal the RPL of its selector"),
]

V8086: list[tuple[Change, str]] = [
    (
        {F.GUEST_DS_BASE: 0x1010},
        "DS: base must be selector * 16 in virtual-8086 mode",
    ),
    ({F.GUEST_SS_LIMIT: 0x1FFFF}, "SS: limit must be FFFFH in virtual-8086 mode"),
    ({CS: 0x9B}, "CS: access rights must be F3H in virtual-8086 mode"),
]

REAL: list[tuple[Change, str]] = [
    ({CS: 0x93 | 1 << 5}, "CS: DPL must be 0 for type 3"),
    ({F.GUEST_CR0: (Cr0.PG, 0)}, "CR0.PG needs CR0.PE"),
    ({F.GUEST_RIP: 1 << 32}, "bits 63:32 of RIP must be 0 outside 64-bit mode"),
    ({CS: 0x91}, "CS: type must be one of 3, 9, 11, 13, 15"),
]

ALL = [
    pytest.param(mode, change, text, id=f"{mode.__name__}: {text}")
    for mode, rows in (
        (long_guest, LONG),
        (legacy_guest, LEGACY),
        (v8086_guest, V8086),
        (real_mode_guest, REAL),
    )
    for change, text in rows
]


def apply(vmcs: dict[Field, int], change: Change) -> dict[Field, int]:
    vmcs = dict(vmcs)
    for field, value in change.items():
        if isinstance(value, tuple):
            vmcs[field] = vmcs.get(field, 0) & ~int(value[1]) | int(value[0])
        else:
            vmcs[field] = int(value)
    return vmcs


Mode = Callable[[dict[Field, int]], dict[Field, int]]


@pytest.mark.parametrize(("mode", "change", "text"), ALL)
def test_one_guest_rule(mode: Mode, change: Change, text: str) -> None:
    found = check(apply(mode(baseline(CAPS)), change), CAPS)
    assert [violation.text for violation in found] == [text]
    assert found[0].stage is Stage.GUEST
    assert found[0].qualification == 0
    assert set(found[0].fields) & set(change)


UNUSABLE = 1 << 16


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (long_guest, {}),
        (legacy_guest, {}),
        (v8086_guest, {}),
        (real_mode_guest, {}),
        (long_guest, {DS: UNUSABLE, FS: UNUSABLE, F.GUEST_DS_BASE: 1 << 40}),
        (long_guest, {SS: UNUSABLE}),
        (long_guest, {LDTR: LDT}),
        (long_guest, {LDTR: UNUSABLE, F.GUEST_LDTR_BASE: BAD, F.GUEST_LDTR_SELECTOR: 4}),
        (long_guest, {F.GUEST_RIP: BAD}),
        (long_guest, {F.GUEST_CR0: (3 << 29, 0)}),
        (long_guest, {F.GUEST_CR4: (Cr4.PCIDE, 0)}),
        (long_guest, {INFO: IRQ, F.GUEST_RFLAGS: IF}),
        (long_guest, {INFO: NMI, BLOCK: 8}),
        (long_guest, {BLOCK: 1, F.GUEST_RFLAGS: IF}),
        (long_guest, {BLOCK: 2, PENDING: PendingDebug.BS, F.GUEST_RFLAGS: TF}),
        (long_guest, {PENDING: PendingDebug.BS}),
        (long_guest, {PENDING: PendingDebug.RTM | PendingDebug.ENABLED_BREAKPOINT}),
        (long_guest, {STATE: ActivityState.HLT, INFO: NMI}),
        (long_guest, {STATE: ActivityState.WAIT_FOR_SIPI}),
        (long_guest, {CS: CODE | 4}),
        (legacy_guest, {TR: 0x83}),
        (legacy_guest, {CS: 0xC09B | 1 << 13}),
        (real_mode_guest, {CS: 0x9B}),
        (real_mode_guest, {F.GUEST_DS_SELECTOR: 0x2003}),
        (real_mode_guest, {F.GUEST_SS_SELECTOR: 0x2003}),
    ],
)
def test_accepted(mode: Mode, change: Change) -> None:
    assert check(apply(mode(baseline(CAPS)), change), CAPS) == []


def test_real_mode_needs_unrestricted_guest() -> None:
    vmcs = real_mode_guest(baseline(CAPS))
    vmcs[F.SECONDARY_VM_EXEC_CONTROL] &= ~Proc2Ctl.UNRESTRICTED_GUEST.value
    texts = [v.text for v in check(vmcs, CAPS)]
    assert "CR0: PE|PG must be 1" in texts
    assert "CS: type must be one of 9, 11, 13, 15" in texts


def test_v8086_excludes_long_mode_and_needs_pe() -> None:
    assert "RFLAGS.VM must be 0 in IA-32e mode" in [
        v.text for v in check(apply(baseline(CAPS), {F.GUEST_RFLAGS: 0x20002}), CAPS)
    ]
    real = real_mode_guest(baseline(CAPS))
    assert "RFLAGS.VM needs CR0.PE" in [
        v.text for v in check(apply(real, {F.GUEST_RFLAGS: 0x20002}), CAPS)
    ]


def test_hlt_state_needs_cpl0() -> None:
    vmcs = apply(
        baseline(CAPS),
        {
            STATE: 1,
            CS: CODE | 3 << 5,
            SS: DATA | 3 << 5,
            F.GUEST_CS_SELECTOR: 0xB,
            F.GUEST_SS_SELECTOR: 0x13,
        },
    )
    assert [v.text for v in check(vmcs, CAPS)] == ["the HLT state needs DPL 0 in SS"]


def test_nmi_under_sti_is_left_to_the_processor() -> None:
    vmcs = apply(baseline(CAPS), {BLOCK: 1, INFO: NMI, F.GUEST_RFLAGS: IF})
    (violation,) = check(vmcs, CAPS)
    assert violation.optional
    assert violation.qualification == 3


@pytest.mark.parametrize(
    ("pointer", "word", "shadowing", "texts"),
    [
        (0x8000, 0x11E57ED0, False, []),
        (0x8000, 0x91E57ED0, True, []),
        (0x8000, 0x91E57ED0, False, ["the VMCS link pointer must lead to an ordinary VMCS"]),
        (0x8000, 0x11E57ED0, True, ["the VMCS link pointer must lead to a shadow VMCS"]),
        (0x8000, 1, False, ["the VMCS link pointer must lead to the VMCS revision identifier"]),
        (0x8008, 0x11E57ED0, False, ["the VMCS link pointer must be aligned to 4096 bytes"]),
        (
            1 << 46,
            0,
            False,
            ["the VMCS link pointer must not exceed the physical-address width"],
        ),
        (0x4000, 0x11E57ED0, False, ["the VMCS link pointer must not be the current VMCS"]),
        (2**64 - 1, 0, True, []),
    ],
)
def test_link_pointer(pointer: int, word: int, shadowing: bool, texts: list[str]) -> None:
    vmcs = baseline(CAPS) | {F.VMCS_LINK_POINTER: pointer}
    if shadowing:
        vmcs[F.SECONDARY_VM_EXEC_CONTROL] = Proc2Ctl.VMCS_SHADOWING.value
    found = check(
        vmcs,
        CAPS,
        lambda gpa, size: word.to_bytes(4, "little") if gpa == pointer else None,
        EntryContext(current_vmcs=0x4000),
    )
    assert [v.text for v in found] == texts
    assert all(v.qualification == 4 for v in found)


def pae_guest(ept: bool) -> dict[Field, int]:
    vmcs = legacy_guest(baseline(CAPS))
    vmcs[F.GUEST_CR4] |= Cr4.PAE.value
    if ept:
        vmcs[F.SECONDARY_VM_EXEC_CONTROL] = Proc2Ctl.ENABLE_EPT.value
        vmcs[F.EPT_POINTER] = 0x501E
    return vmcs


@pytest.mark.parametrize("value", [1 | 2, 1 | 1 << 5, 1 | 1 << 46, 1 | 1 << 63])
def test_pdptes_in_the_vmcs(value: int) -> None:
    vmcs = pae_guest(ept=True)
    assert check(vmcs, CAPS) == []
    found = check(vmcs | {F.GUEST_PDPTR2: value}, CAPS)
    assert [(v.text, v.qualification) for v in found] == [("PDPTE 2 must not set reserved bits", 2)]
    assert check(vmcs | {F.GUEST_PDPTR2: value & ~1}, CAPS) == []


def test_pdptes_in_memory() -> None:
    table = bytes(24) + (7).to_bytes(8, "little")
    vmcs = pae_guest(ept=False) | {F.GUEST_CR3: 0x1018}
    found = check(vmcs, CAPS, lambda gpa, size: table if (gpa, size) == (0x1000, 32) else None)
    assert [(v.text, v.qualification) for v in found] == [("PDPTE 3 must not set reserved bits", 2)]
    unchanged = EntryContext(pae_reload=False)
    assert check(vmcs, CAPS, lambda gpa, size: table, unchanged) == []
