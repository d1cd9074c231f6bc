"""Random near-valid VMCSs: a few fields changed, to values at the edge of what is legal."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import replace

from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.model import AREA_ENTRIES, REGION, VITAL, FuzzCase, modes
from kvmnest.l1.baseline import L2Mode
from kvmnest.vmx import Cr4, EntryCtl, ExitCtl, Msr, PinCtl, Proc2Ctl, ProcCtl, Rflags
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.rules import Stage

_WORDS: dict[F, type[enum.IntFlag]] = {
    F.PIN_BASED_VM_EXEC_CONTROL: PinCtl,
    F.CPU_BASED_VM_EXEC_CONTROL: ProcCtl,
    F.SECONDARY_VM_EXEC_CONTROL: Proc2Ctl,
    F.VM_EXIT_CONTROLS: ExitCtl,
    F.VM_ENTRY_CONTROLS: EntryCtl,
}
#: Addresses, with the control that puts them into use.
_ADDRESSES: dict[F, enum.IntFlag | None] = {
    F.IO_BITMAP_A: ProcCtl.USE_IO_BITMAPS,
    F.IO_BITMAP_B: ProcCtl.USE_IO_BITMAPS,
    F.MSR_BITMAP: ProcCtl.USE_MSR_BITMAPS,
    F.VIRTUAL_APIC_PAGE_ADDR: ProcCtl.USE_TPR_SHADOW,
    F.APIC_ACCESS_ADDR: Proc2Ctl.VIRTUALIZE_APIC_ACCESSES,
    F.VMREAD_BITMAP: Proc2Ctl.VMCS_SHADOWING,
    F.VMWRITE_BITMAP: Proc2Ctl.VMCS_SHADOWING,
    F.PML_ADDRESS: Proc2Ctl.ENABLE_PML,
}
_AREAS = {
    F.VM_ENTRY_MSR_LOAD_ADDR: F.VM_ENTRY_MSR_LOAD_COUNT,
    F.VM_EXIT_MSR_STORE_ADDR: F.VM_EXIT_MSR_STORE_COUNT,
    F.VM_EXIT_MSR_LOAD_ADDR: F.VM_EXIT_MSR_LOAD_COUNT,
}
_CANONICAL = (
    *(F.GUEST_SYSENTER_ESP, F.GUEST_SYSENTER_EIP, F.HOST_IA32_SYSENTER_ESP),
    *(F.HOST_IA32_SYSENTER_EIP, F.GUEST_FS_BASE, F.GUEST_GS_BASE, F.HOST_FS_BASE),
    *(F.HOST_GS_BASE, F.GUEST_TR_BASE, F.GUEST_LDTR_BASE, F.GUEST_GDTR_BASE),
    *(F.GUEST_IDTR_BASE, F.HOST_TR_BASE, F.HOST_GDTR_BASE, F.HOST_IDTR_BASE),
    *(F.GUEST_CS_BASE, F.GUEST_SS_BASE, F.GUEST_DS_BASE, F.GUEST_ES_BASE),
    *(F.HOST_RIP, F.GUEST_RIP),
)
_SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_RIGHTS = (0x93, 0x9B, 0xA09B, 0xC09B, 0xC093, 0xF3, 0xFB, 0x8B, 0x83, 0x82, 0x10000, 0x97, 0x9F)
_LIMITS = (0, 0x67, 0xFFF, 0xFFFF, 0x10000, 0xFFFFF, 0x100000, 0xFFFFFFFF, 0xFFFFF000)

#: Host state that is changed only where the rules refuse the entry.
_VITAL = (
    *VITAL,
    # With other addresses a VMX abort would follow, or an MSR-load area full of zeros.
    *_AREAS,
)
_HARMLESS_CR4 = (
    *(Cr4.VME, Cr4.PVI, Cr4.TSD, Cr4.DE, Cr4.MCE, Cr4.PGE, Cr4.PCE, Cr4.FSGSBASE, Cr4.PCIDE),
    *(Cr4.OSXSAVE, Cr4.UMIP),
)
#: Where the delivery of an event would write.
_DELIVERY = (
    *(F.GUEST_RSP, F.GUEST_SS_BASE, F.GUEST_CS_BASE, F.GUEST_IDTR_BASE, F.GUEST_IDTR_LIMIT),
    *(F.GUEST_GDTR_BASE, F.GUEST_TR_BASE, F.GUEST_CR3, F.EPT_POINTER),
)


class Generator:
    """Draws cases that a processor with these capabilities could be asked to enter.

    ``draw`` takes all its chance from the given ``random.Random``, so a case belongs to a seed,
    and Hypothesis can lead it.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._caps = judge.caps
        self._modes = tuple(modes(judge.caps, judge.payload))
        self._kinds: tuple[tuple[int, Callable[[random.Random, FuzzCase], FuzzCase]], ...] = (
            (6, self._word),
            (3, self._address),
            (3, self._area),
            (5, self._event),
            (4, self._control_register),
            (3, self._msr),
            (4, self._canonical),
            (8, self._segment),
            (2, self._host_selector),
            (3, self._rflags),
            (4, self._non_register),
            (2, self._link),
            (2, self._apic),
            (2, self._translation),
            (1, self._counts),
        )

    def numbered(self, seed: int, number: int) -> FuzzCase:
        """Case ``number`` of a seed, always the same one."""
        return self.draw(random.Random(f"kvmnest {seed} {number}"))

    def draw(self, chance: random.Random) -> FuzzCase:
        """Draw one case."""
        weights = [8 if mode is L2Mode.LONG else 2 for mode in self._modes]
        case = FuzzCase(chance.choices(self._modes, weights)[0])
        if case.mode in (L2Mode.PROTECTED, L2Mode.UNPAGED) and chance.random() < 0.25:
            case = replace(case, v8086=True)
        kinds = [kind for _, kind in self._kinds]
        for _ in range(chance.choice((1, 1, 1, 1, 2, 2, 3, 4))):
            kind = chance.choices(kinds, [weight for weight, _ in self._kinds])[0]
            case = kind(chance, case)
        existing = {f: v for f, v in case.changes.items() if self._caps.field_exists(f)}
        return self._tame(replace(case, changes=existing))

    # --- kinds of changes ---

    def _now(self, case: FuzzCase, field: F) -> int:
        return case.changes.get(field, self._judge.base(case).get(field, 0))

    def _set(self, case: FuzzCase, field: F, value: int) -> FuzzCase:
        return replace(case, changes={**case.changes, field: value & field.width.mask})

    def _flip(self, chance: random.Random, case: FuzzCase, field: F, bits: int) -> FuzzCase:
        return self._set(case, field, self._now(case, field) ^ 1 << chance.randrange(bits))

    def _enable(self, case: FuzzCase, flag: enum.IntFlag) -> FuzzCase:
        """Set a control (and what activates it), if the processor has it."""
        if not self._caps.supports(flag):
            return case
        word = next(word for word, kind in _WORDS.items() if isinstance(flag, kind))
        if word is F.SECONDARY_VM_EXEC_CONTROL:
            case = self._enable(case, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
        return self._set(case, word, self._now(case, word) | flag.value)

    def _word(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        field = chance.choice([*_WORDS, F.CPU_BASED_VM_EXEC_CONTROL, F.SECONDARY_VM_EXEC_CONTROL])
        kind = _WORDS[field]
        if not self._caps.field_exists(field):
            return case
        free = self._caps.may_be_one(kind) & ~self._caps.must_be_one(kind)
        bits = [bit for bit in range(32) if free >> bit & 1]
        if bits and chance.random() < 0.8:
            value = self._now(case, field) ^ 1 << chance.choice(bits)
            if chance.random() < 0.3:
                value ^= 1 << chance.choice(bits)
            if field is F.SECONDARY_VM_EXEC_CONTROL:
                case = self._enable(case, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
            return self._set(case, field, value)
        return self._flip(chance, case, field, 32)

    def _bad_address(self, chance: random.Random, good: int) -> int:
        width = self._caps.cpu.physical_bits
        return chance.choice(
            (
                *(good, good + 1, good + 8, good + 0x10, good | 0x800, good + 0x1000, 0),
                *(good | 1 << width, good | 1 << 63, 1 << (width - 1)),
                good | 1 << chance.randrange(22, 64),
            )
        )

    def _address(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        field, flag = chance.choice(list(_ADDRESSES.items()))
        if flag is not None and chance.random() < 0.85:
            case = self._enable(case, flag)
        return self._set(case, field, self._bad_address(chance, self._now(case, field)))

    def _area(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        field, count = chance.choice(list(_AREAS.items()))
        case = self._set(case, count, chance.randint(0, AREA_ENTRIES))
        if chance.random() < 0.5:
            return self._set(case, field, self._bad_address(chance, self._now(case, field)))
        if field is F.VM_ENTRY_MSR_LOAD_ADDR:
            good = (Msr.SYSENTER_CS, Msr.KERNEL_GS_BASE, Msr.SYSENTER_ESP)
            bad = (Msr.FS_BASE, Msr.GS_BASE, 0x800, 0x8FF, Msr.SMM_MONITOR_CTL, Msr.SMBASE)
            area = b""
            for _ in range(AREA_ENTRIES):
                index = int(chance.choice(good if chance.random() < 0.7 else bad))
                reserved = chance.choice((0, 0, 0, 0, 0, 1, 1 << 31))
                area += index.to_bytes(4, "little") + reserved.to_bytes(4, "little") + bytes(8)
            return replace(case, memory={**case.memory, "entry_load_msrs": area})
        return case

    def _event(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        vector = chance.choice((0, 1, 2, 3, 6, 8, 11, 13, 14, 17, 18, 20, 21, 31, 32, 64, 255))
        info = 1 << 31 | chance.randrange(8) << 8 | vector
        if chance.random() < 0.4:
            info |= 1 << 11
        if chance.random() < 0.1:
            info |= 1 << chance.randrange(12, 31)
        case = self._set(case, F.VM_ENTRY_INTR_INFO_FIELD, info)
        if chance.random() < 0.4:
            code = chance.choice((0, 1, 2, 0xFFFF, 0x10000, 1 << chance.randrange(32)))
            case = self._set(case, F.VM_ENTRY_EXCEPTION_ERROR_CODE, code)
        if chance.random() < 0.4:
            length = chance.choice((0, 1, 2, 3, 15, 16, 0x10000001))
            case = self._set(case, F.VM_ENTRY_INSTRUCTION_LEN, length)
        if chance.random() < 0.4:
            flags = self._now(case, F.GUEST_RFLAGS) ^ Rflags.IF
            case = self._set(case, F.GUEST_RFLAGS, flags)
        return case

    def _control_register(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        field = chance.choice((F.GUEST_CR0, F.GUEST_CR4, F.HOST_CR0, F.HOST_CR4, F.GUEST_CR3))
        if field is F.GUEST_CR3 or chance.random() < 0.15:
            field = chance.choice((F.GUEST_CR3, F.HOST_CR3, field))
            return self._flip(chance, case, field, 64)
        return self._flip(chance, case, field, chance.choice((12, 32, 32, 64)))

    def _msr(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        guest = chance.random() < 0.6
        name = chance.choice(("EFER", "EFER", "PAT", "DEBUG", "PERF"))
        if name == "EFER":
            case = self._enable(case, EntryCtl.LOAD_EFER if guest else ExitCtl.LOAD_EFER)
            field = F.GUEST_IA32_EFER if guest else F.HOST_IA32_EFER
            value = self._now(case, field) ^ 1 << chance.choice((0, 0, 8, 8, 10, 10, 11, 1, 9, 12))
            return self._set(case, field, value if chance.random() < 0.9 else value ^ 1 << 40)
        if name == "PAT":
            case = self._enable(case, EntryCtl.LOAD_PAT if guest else ExitCtl.LOAD_PAT)
            field = F.GUEST_IA32_PAT if guest else F.HOST_IA32_PAT
            shift = 8 * chance.randrange(8)
            kept = self._now(case, field) & ~(0xFF << shift)
            return self._set(case, field, kept | chance.choice((*range(9), 0x10, 0xFF)) << shift)
        if name == "PERF":
            flags = EntryCtl.LOAD_PERF_GLOBAL_CTRL, ExitCtl.LOAD_PERF_GLOBAL_CTRL
            case = self._enable(case, flags[0] if guest else flags[1])
            field = F.GUEST_IA32_PERF_GLOBAL_CTRL if guest else F.HOST_IA32_PERF_GLOBAL_CTRL
            return self._flip(chance, case, field, 64)
        case = self._enable(case, EntryCtl.LOAD_DEBUG_CONTROLS)
        field = chance.choice((F.GUEST_DR7, F.GUEST_IA32_DEBUGCTL))
        return self._flip(chance, case, field, 64 if field is F.GUEST_DR7 else 20)

    def _canonical(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        top = 1 << (self._caps.cpu.linear_bits - 1)
        low = self._now(case, field := chance.choice(_CANONICAL)) & 0xFFFFFFFF
        every = (1 << 64) - 1
        edge = (top - 1, top, top << 1, every ^ (top - 1), every ^ (2 * top - 1), every ^ top)
        value = chance.choice((*edge, 1 << 32, 1 << 63, low | 1 << chance.randrange(32, 64), 0))
        return self._set(case, field, value)

    def _segment(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        name = chance.choice(_SEGMENTS)
        what = chance.choice(("SELECTOR", "ACCESS_RIGHTS", "ACCESS_RIGHTS", "LIMIT"))
        field = F[f"GUEST_{name}_{what}"]
        if what == "LIMIT":
            return self._set(case, field, chance.choice(_LIMITS))
        if what == "SELECTOR":
            return self._set(
                case, field, self._now(case, field) ^ chance.choice((1, 2, 3, 4, 7, 8))
            )
        if chance.random() < 0.4:
            return self._set(case, field, chance.choice(_RIGHTS))
        return self._flip(chance, case, field, chance.choice((4, 8, 17, 17, 32)))

    def _host_selector(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        field = F[f"HOST_{chance.choice(('ES', 'CS', 'SS', 'DS', 'FS', 'GS', 'TR'))}_SELECTOR"]
        return self._set(
            case, field, chance.choice((0, 1, 2, 4, 8, 16, self._now(case, field) | 3))
        )

    def _rflags(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        bit = chance.choice((1, 3, 5, 8, 9, 9, 14, 15, 17, 18, 19, 21, 22, 31, 32, 63))
        return self._set(case, F.GUEST_RFLAGS, self._now(case, F.GUEST_RFLAGS) ^ 1 << bit)

    def _non_register(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        what = chance.choice(("activity", "blocking", "blocking", "pending", "pdpte", "tables"))
        if what == "activity":
            return self._set(
                case, F.GUEST_ACTIVITY_STATE, chance.choice((0, 1, 1, 2, 3, 4, 1 << 31))
            )
        if what == "blocking":
            value = chance.choice((1, 1, 2, 2, 3, 4, 8, 16, 18, 9, 1 << chance.randrange(32)))
            if chance.random() < 0.5:
                case = self._set(case, F.GUEST_RFLAGS, self._now(case, F.GUEST_RFLAGS) | Rflags.IF)
            return self._set(case, F.GUEST_INTERRUPTIBILITY_INFO, value)
        if what == "pending":
            return self._flip(chance, case, F.GUEST_PENDING_DBG_EXCEPTIONS, chance.choice((17, 64)))
        if what == "pdpte":
            field = F[f"GUEST_PDPTR{chance.randrange(4)}"]
            return self._flip(chance, case, field, chance.choice((12, 64)))
        field = chance.choice((F.GUEST_GDTR_LIMIT, F.GUEST_IDTR_LIMIT))
        return self._set(case, field, chance.choice((0xFFFF, 0x10000, 0x1FFFF, 0x80000000)))

    def _link(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        page = self._judge.payload["shadow_vmcs"]
        pointer = chance.choice((page, page, page, self._judge.payload[REGION], page + 0x10))
        if chance.random() < 0.3:
            pointer = self._bad_address(chance, page)
        revision = self._caps.basic.revision_id
        word = chance.choice((revision, revision | 1 << 31, revision ^ 1, 0))
        if chance.random() < 0.5:
            case = self._enable(case, Proc2Ctl.VMCS_SHADOWING)
        case = replace(case, memory={**case.memory, "shadow_vmcs": word.to_bytes(4, "little")})
        return self._set(case, F.VMCS_LINK_POINTER, pointer)

    def _apic(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        case = self._enable(case, ProcCtl.USE_TPR_SHADOW)
        if chance.random() < 0.3:
            case = self._enable(case, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
        vtpr = bytes(0x80) + bytes([chance.choice((0, 0x0F, 0x10, 0x3F, 0x40, 0xF0))])
        case = replace(case, memory={**case.memory, "virtual_apic": vtpr})
        threshold = chance.choice((0, 1, 2, 3, 4, 5, 15, 16, 1 << chance.randrange(32)))
        return self._set(case, F.TPR_THRESHOLD, threshold)

    def _translation(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        what = chance.choice(("eptp", "vpid", "functions"))
        if what == "eptp":
            return self._flip(chance, case, F.EPT_POINTER, chance.choice((12, 12, 64)))
        if what == "vpid":
            case = self._enable(case, Proc2Ctl.ENABLE_VPID)
            return self._set(case, F.VIRTUAL_PROCESSOR_ID, chance.choice((0, 1, 0xFFFF)))
        case = self._enable(case, Proc2Ctl.ENABLE_VM_FUNCTIONS)
        case = self._set(case, F.VM_FUNCTION_CONTROL, chance.choice((0, 1, 2, 1 << 63)))
        value = self._bad_address(chance, self._now(case, F.EPTP_LIST_ADDRESS))
        return self._set(case, F.EPTP_LIST_ADDRESS, value)

    def _counts(self, chance: random.Random, case: FuzzCase) -> FuzzCase:
        return self._set(case, F.CR3_TARGET_COUNT, chance.choice((0, 1, 4, 5, 8, 0x80000000)))

    # --- what must not happen to L1 ---

    def _tame(self, case: FuzzCase) -> FuzzCase:
        """Leave alone what L1 needs afterwards and what L2 could break.

        Host state is loaded by VM exits and by entries that fail on guest state; only where the
        rules refuse an entry before that may it be anything.
        """
        stage = self._judge.predict(case)
        if stage.must_fail and stage.stage in (Stage.CONTROL, Stage.HOST):
            return case
        base, changes = self._judge.base(case), dict(case.changes)
        for field in _VITAL:
            changes.pop(field, None)
        if F.HOST_CR4 in changes:
            harmless = sum(flag.value for flag in _HARMLESS_CR4)
            if (changes[F.HOST_CR4] ^ base[F.HOST_CR4]) & ~harmless:
                del changes[F.HOST_CR4]
        if stage.may_succeed:
            pin = changes.get(F.PIN_BASED_VM_EXEC_CONTROL)
            if pin is not None and self._caps.supports(PinCtl.ACTIVATE_PREEMPTION_TIMER):
                changes[F.PIN_BASED_VM_EXEC_CONTROL] = pin | PinCtl.ACTIVATE_PREEMPTION_TIMER.value
            if changes.get(F.VM_ENTRY_INTR_INFO_FIELD, 0) >> 31:
                for field in _DELIVERY:
                    changes.pop(field, None)
        tamed = replace(case, changes=changes)
        # A change that was taken back may have been what another one needed.
        return tamed if changes == case.changes else self._tame(tamed)
