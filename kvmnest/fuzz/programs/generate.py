"""Programs of a seed: what L1 and its host do, in an order that may be a wrong one."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kvmnest.fuzz.generate import Generator
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.model import base_memory, modes
from kvmnest.fuzz.programs import l2code
from kvmnest.fuzz.programs.base import base_vmcs
from kvmnest.fuzz.programs.program import HOST_ACTIONS, PAUSE_PORT, Program, Step
from kvmnest.l1.baseline import L2Mode
from kvmnest.vmx import EntryCtl, EptVpidCap, ExitCtl, Field, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.fields import Kind

REGIONS = ("vmcs_a", "vmcs_b", "vmcs_c")
#: A region that no VMCS of a program is in.
_UNUSED = "vmcs_d"
_BITS = {L2Mode.LONG: 64, L2Mode.REAL: 16}
_FREE_PROC = (
    *(ProcCtl.INVLPG_EXITING, ProcCtl.MWAIT_EXITING),
    *(ProcCtl.CR3_LOAD_EXITING, ProcCtl.CR3_STORE_EXITING, ProcCtl.CR8_LOAD_EXITING),
    *(ProcCtl.CR8_STORE_EXITING, ProcCtl.MOV_DR_EXITING, ProcCtl.USE_MSR_BITMAPS),
    *(ProcCtl.MONITOR_EXITING, ProcCtl.PAUSE_EXITING, ProcCtl.USE_TSC_OFFSETTING),
)
_RARE_PROC = (
    *(ProcCtl.MONITOR_TRAP_FLAG, ProcCtl.INTERRUPT_WINDOW_EXITING, ProcCtl.NMI_WINDOW_EXITING),
    ProcCtl.USE_TPR_SHADOW,
)
_FREE_PROC2 = (
    *(Proc2Ctl.DESCRIPTOR_TABLE_EXITING, Proc2Ctl.ENABLE_RDTSCP, Proc2Ctl.ENABLE_VPID),
    *(Proc2Ctl.WBINVD_EXITING, Proc2Ctl.ENABLE_INVPCID, Proc2Ctl.UNRESTRICTED_GUEST),
)
_FREE_PIN = (PinCtl.EXTERNAL_INTERRUPT_EXITING, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
_FREE_EXIT = (
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    *(ExitCtl.SAVE_DEBUG_CONTROLS, ExitCtl.SAVE_PAT, ExitCtl.LOAD_PAT, ExitCtl.SAVE_EFER),
    ExitCtl.LOAD_EFER,
)
_FREE_ENTRY = (EntryCtl.LOAD_DEBUG_CONTROLS, EntryCtl.LOAD_PAT)
#: Fields that no capability reports and KVM does not have.
_NOT_IN_KVM = (
    *(Field.EXECUTIVE_VMCS_POINTER, Field.GUEST_SMBASE, Field.IO_RCX, Field.IO_RSI),
    *(Field.IO_RDI, Field.IO_RIP),
)
#: Of what Bochs does not have.
_PERFORMANCE = {Field.GUEST_IA32_PERF_GLOBAL_CTRL, Field.HOST_IA32_PERF_GLOBAL_CTRL}
_REGS = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r15")


class ProgramGenerator:
    """Draws programs for a machine with these capabilities, all chance from the seed.

    ``host``: wherever they run there is KVM, so that L2 may wait for its host, and L1 may have a
    second vCPU.
    """

    def __init__(self, judge: Judge, *, host: bool = False) -> None:
        self._judge, self._caps, self._payload = judge, judge.caps, judge.payload
        self.host = host
        self._vmcss = Generator(judge)
        self._modes = tuple(modes(judge.caps, judge.payload))

    def numbered(self, seed: int, number: int) -> Program:
        """Program ``number`` of a seed, always the same one."""
        return self.draw(random.Random(f"kvmnest program {seed} {number}"))

    def draw(self, chance: random.Random) -> Program:
        """Draw one program."""
        weights = [8 if mode is L2Mode.LONG else 2 for mode in self._modes]
        mode = chance.choices(self._modes, weights)[0]
        return Program(tuple(_Draw(self, chance, mode).steps()))


class _Draw:
    """One program that is being drawn."""

    def __init__(self, generator: ProgramGenerator, chance: random.Random, mode: L2Mode) -> None:
        self._chance, self._mode = chance, mode
        self._caps, self._payload = generator._caps, generator._payload
        self._vmcss = generator._vmcss
        self._base = base_vmcs(self._caps, self._payload, mode)
        self._apic = chance.random() < 0.25
        self._host = generator.host
        of_bits = l2code.Machine.of(self._payload, _BITS.get(mode, 32), self._caps.cr4_fixed1)
        self._machine = replace(of_bits, apic=self._apic, pauses=self._host)
        self._launched = False
        self._region = "vmcs_a"

    def steps(self) -> Iterator[Step]:
        second = self._host and self._chance.random() < 0.1
        for step in self._drawn():
            if self._chance.random() < 0.08:
                yield self._pause()
            if second and self._chance.random() < 0.1:
                yield {"do": "cpu", "index": self._chance.choice((0, 1))}
            yield step

    def _pause(self) -> Step:
        """Something that a host does."""
        chance = self._chance
        what = chance.random()
        if what < 0.1:
            bits = 1 << chance.randrange(64) if chance.random() < 0.7 else chance.getrandbits(64)
            # The header, or anything; a region of nested state holds the VMCS behind it.
            offset = chance.choice((chance.randrange(0x80), chance.randrange(0x2080)))
            return {"do": "nested", "offset": offset, "bits": bits}
        if self._apic and what < 0.4:
            kind = chance.choice(("interrupt", "interrupt", "NMI"))
            return {"do": "event", "what": kind, "vector": chance.choice((0x31, 0x51, 0xF1))}
        return {"do": "host", "what": chance.choice((*HOST_ACTIONS, "new VM"))}

    def _drawn(self) -> Iterator[Step]:
        chance = self._chance
        if chance.random() < 0.12:
            yield from self._l1_instructions(chance.randint(1, 5))
        if self._apic:
            for msr, number in _X2APIC:
                code, regs = _wrmsr(msr, number)
                yield {"do": "l1", "code": code.hex(), "regs": dict(regs)}
        # KVM makes a vCPU with the x87 FPU of FNINIT, a processor that was reset has another.
        floats = {"code": _FLOATS.hex(), "regs": {"rdi": self._payload["l2_data"]}}
        yield {"do": "l1", **floats}
        yield {"do": "region", "place": "vmxon_region", "revision": "good"}
        yield self._address("vmxon", "vmxon_region")
        yield from self._load("vmcs_a")
        kinds = [kind for kind, _ in _KINDS]
        for _ in range(chance.randint(1, 6)):
            kind = chance.choices(kinds, [weight for _, weight in _KINDS])[0]
            yield from kind(self)

    # --- kinds ---

    def _address(self, name: str, place: str, offset: int = 0) -> Step:
        return {"do": "address", "name": name, "place": place, "offset": offset}

    def _load(self, region: str) -> Iterator[Step]:
        """A VMCS with L2's code, ready for VMLAUNCH."""
        yield {"do": "region", "place": region, "revision": "good"}
        yield self._address("vmclear", region)
        yield self._address("vmptrld", region)
        yield {"do": "base", "mode": self._mode.name}
        yield from self._code()
        self._launched, self._region = False, region
        if self._chance.random() < 0.75:
            yield from self._controls()
        yield from self._enter()

    def _code(self) -> Iterator[Step]:
        drawn = l2code.parts(self._chance, self._machine, self._chance.randint(1, 7))
        yield {"do": "code", "parts": [part.hex() for part in drawn]}

    def _new_code(self) -> Iterator[Step]:
        yield from self._code()
        yield from self._enter()

    def _enter(self) -> Iterator[Step]:
        chance = self._chance
        right = "vmresume" if self._launched else "vmlaunch"
        wrong = "vmlaunch" if self._launched else "vmresume"
        regs = {name: l2code.value(chance) for name in _REGS if chance.random() < 0.2}
        name = wrong if chance.random() < 0.04 else right
        step: dict[str, Any] = {
            "do": "enter",
            "name": name,
            "regs": regs,
            "most": chance.choice((1, 8, 8, 8)),
        }
        if self._host:
            step["pauses"] = [self._pause() for _ in range(chance.randint(0, 4))]
        yield step
        self._launched = True

    def _flags(self, flags: tuple[Any, ...], likely: float) -> int:
        value = 0
        for flag in flags:
            if self._chance.random() < likely and self._caps.supports(flag):
                value |= flag.value
        return value

    def _controls(self) -> Iterator[Step]:
        """Other controls, all legal; bitmaps and masks."""
        chance, base = self._chance, self._base
        fields: dict[Field, int] = {}
        proc = base[Field.CPU_BASED_VM_EXEC_CONTROL] | self._flags(_FREE_PROC, 0.35)
        proc |= self._flags(_RARE_PROC, 0.04)
        if chance.random() < (0.85 if self._host else 0.4):
            proc |= ProcCtl.USE_IO_BITMAPS.value & self._caps.may_be_one(ProcCtl)
            for place in ("io_bitmap_a", "io_bitmap_b"):
                yield _memory(place, b"\xff", times=4096)
                if chance.random() < 0.1:
                    yield _memory(place, b"\xfe", offset=chance.randrange(4096))
            if self._host:
                byte = 0xFF ^ 1 << PAUSE_PORT % 8
                yield _memory("io_bitmap_a", bytes([byte]), offset=PAUSE_PORT // 8)
        if proc & ProcCtl.USE_MSR_BITMAPS:
            yield _memory("msr_bitmap", bytes([chance.choice((0, 0, 0x55, 0xFF))]), times=4096)
        if Field.SECONDARY_VM_EXEC_CONTROL in base:
            proc |= ProcCtl.ACTIVATE_SECONDARY_CONTROLS.value
            second = base[Field.SECONDARY_VM_EXEC_CONTROL] | self._flags(_FREE_PROC2, 0.3)
            fields[Field.SECONDARY_VM_EXEC_CONTROL] = second
        fields[Field.CPU_BASED_VM_EXEC_CONTROL] = proc
        if self._apic or chance.random() < 0.1:
            pin = base[Field.PIN_BASED_VM_EXEC_CONTROL] | self._flags(_FREE_PIN, 0.6)
            fields[Field.PIN_BASED_VM_EXEC_CONTROL] = pin
            fields[Field.GUEST_RFLAGS] = chance.choice((2, 0x202))
        fields[Field.VM_EXIT_CONTROLS] = base[Field.VM_EXIT_CONTROLS] | self._flags(_FREE_EXIT, 0.3)
        entry = base[Field.VM_ENTRY_CONTROLS] | self._flags(_FREE_ENTRY, 0.3)
        fields[Field.VM_ENTRY_CONTROLS] = entry
        word = chance.getrandbits(32)
        bitmap_value = chance.choice((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0, word))
        fields[Field.EXCEPTION_BITMAP] = bitmap_value
        if chance.random() < 0.2:
            fields[Field.PAGE_FAULT_ERROR_CODE_MASK] = chance.choice((0, 1, 2, 3, 0xFFFFFFFF))
            fields[Field.PAGE_FAULT_ERROR_CODE_MATCH] = chance.choice((0, 1, 2, 3))
        for register, bits in (("CR0", 32), ("CR4", 23)):
            if chance.random() < 0.5:
                mask = chance.getrandbits(bits) & chance.getrandbits(bits)
                mask = chance.choice((mask, mask, (1 << 64) - 1, 0))
                fields[Field[f"{register}_GUEST_HOST_MASK"]] = mask
                fields[Field[f"{register}_READ_SHADOW"]] = chance.getrandbits(bits)
        if self._caps.misc.cr3_targets and chance.random() < 0.2:
            fields[Field.CR3_TARGET_COUNT] = chance.randint(0, self._caps.misc.cr3_targets)
            fields[Field.CR3_TARGET_VALUE0] = base[Field.GUEST_CR3]
        yield self._fields(fields)

    def _fields(self, fields: Mapping[Field, int]) -> Step:
        there = {f: v for f, v in fields.items() if self._caps.field_exists(f)}
        return {"do": "fields", "fields": {field.name: int(v) for field, v in there.items()}}

    def _again(self) -> Iterator[Step]:
        yield from self._controls()
        yield self._fields({Field.GUEST_RIP: self._base[Field.GUEST_RIP]})
        yield from self._new_code()

    def _changed(self) -> Iterator[Step]:
        """A VMCS of the present fuzzer, entered, and taken back."""
        case = self._vmcss.draw(self._chance)
        if case.mode is not self._mode or _PERFORMANCE & case.changes.keys():
            return
        targets = case.changes.get(Field.CR3_TARGET_COUNT, 0)
        if self._caps.misc.cr3_targets < targets < 1 << 31:
            return
        cr4 = case.changes.get(Field.GUEST_CR4, 0) | case.changes.get(Field.HOST_CR4, 0)
        if cr4 & 0xFFFFFFFF & ~(self._caps.cr4_fixed1 | l2code.CR4_RESERVED):
            return
        for label, content in case.memory.items():
            yield _memory(label, content)
        for label, content in base_memory().items():
            if label not in case.memory:
                yield _memory(label, content)
        yield self._fields({f: v & _kept(f) for f, v in case.changes.items()})
        yield from self._enter()
        # What L1 needs must be right again before an entry that may succeed.
        host = any(field.kind is Kind.HOST for field in case.changes)
        areas = any("MSR" in field.name for field in case.changes)
        if host or areas or self._chance.random() < 0.7:
            yield self._fields({field: self._base.get(field, 0) for field in case.changes})
            yield from self._enter()

    def _ept(self) -> Iterator[Step]:
        """EPT, with another entry for a page that L2 uses; L1 invalidates what is cached."""
        if not self._caps.supports(Proc2Ctl.ENABLE_EPT):
            return
        chance, payload = self._chance, self._payload
        yield {"do": "base", "mode": self._mode.name}
        proc = self._base[Field.CPU_BASED_VM_EXEC_CONTROL] | ProcCtl.ACTIVATE_SECONDARY_CONTROLS
        second = self._base.get(Field.SECONDARY_VM_EXEC_CONTROL, 0) | Proc2Ctl.ENABLE_EPT
        accessed = 0x40 if self._caps.supports(EptVpidCap.ACCESSED_DIRTY) else 0
        pointer = payload["ept_pml4"] | 0x1E | chance.choice((0, accessed))
        yield self._fields(
            {
                Field.CPU_BASED_VM_EXEC_CONTROL: proc,
                Field.SECONDARY_VM_EXEC_CONTROL: second,
                Field.EPT_POINTER: pointer,
            }
        )
        page = payload[chance.choice(("l2_data", "l2_data", "l2_stack", "l2_code", "l2_idt"))]
        entry = page & ~0xFFF | chance.choice(_EPT_ENTRIES)
        where = (page >> 12) * 8
        yield _memory("ept_pml4_pt", entry.to_bytes(8, "little"), offset=where)
        yield self._flush()
        yield from self._code()
        yield from self._enter()
        yield _memory("ept_pml4_pt", (page & ~0xFFF | 0x37).to_bytes(8, "little"), offset=where)
        yield self._flush()
        yield from self._enter()

    def _flush(self) -> Step:
        return {"do": "invalidate", "name": "invept", "type": 2, "first": 0, "second": 0}

    def _msr_lists(self) -> Iterator[Step]:
        """Lists of MSRs that VM entry loads and VM exit stores and loads."""
        chance = self._chance
        for place, count in _MSR_LISTS:
            entries = [chance.choice(_LISTED) for _ in range(chance.randint(1, 4))]
            content = b"".join(struct.pack("<IIQ", *entry) for entry in entries)
            yield _memory(place, content)
            yield self._fields({count: chance.choice((len(entries), len(entries), 0))})
        yield from self._new_code()
        yield self._fields({count: 0 for _, count in _MSR_LISTS})

    def _state(self) -> Iterator[Step]:
        """The base VMCS again, so that L2 is sane."""
        yield {"do": "base", "mode": self._mode.name}
        yield from self._code()
        yield from self._enter()

    def _event(self) -> Iterator[Step]:
        """An event to inject that is mostly legal; no INT1, which KVM is known to lose."""
        chance = self._chance
        kind, vector = chance.choice(
            (
                *((0, 32), (0, 0x80), (0, 255), (2, 2), (3, 6), (3, 13), (3, 14), (3, 0)),
                *((4, 0x80), (4, 3), (6, 3), (6, 4), (3, 1), (3, 8), (3, 17)),
            )
        )
        code = kind == 3 and vector in (8, 10, 11, 12, 13, 14, 17) and self._mode is not L2Mode.REAL
        info = 1 << 31 | code << 11 | kind << 8 | vector
        fields = {Field.VM_ENTRY_INTR_INFO_FIELD: info}
        fields[Field.VM_ENTRY_EXCEPTION_ERROR_CODE] = chance.choice((0, 2, 8, 0x10))
        if vector == 8:
            fields[Field.VM_ENTRY_EXCEPTION_ERROR_CODE] = 0
        fields[Field.VM_ENTRY_INSTRUCTION_LEN] = chance.choice((1, 2, 3))
        if kind == 0:
            fields[Field.GUEST_RFLAGS] = 0x202
        if chance.random() < 0.2:
            fields[Field.GUEST_IDTR_LIMIT] = chance.choice((0, 0xF, 0x3F))
        yield self._fields(fields)
        yield from self._enter()

    def _other_vmcs(self) -> Iterator[Step]:
        chance = self._chance
        yield from self._load(chance.choice(REGIONS))
        if chance.random() < 0.4:
            yield self._address("vmptrld", chance.choice(REGIONS))
            yield {"do": "alone", "name": "vmptrst"}
            yield from self._enter()

    def _l1_instructions(self, count: int = 2) -> Iterator[Step]:
        for _ in range(count):
            yield self._l1_instruction()

    def _l1_instruction(self) -> Step:
        chance = self._chance
        what = chance.random()
        if what < 0.3:
            place = chance.choice((*REGIONS, *REGIONS, _UNUSED, "vmxon_region", ""))
            offset = chance.choice((0, 0, 0, 1, 8, 0x800)) if place else chance.choice(_ADDRESSES)
            return self._address(chance.choice(("vmxon", "vmclear", "vmptrld")), place, offset)
        if what < 0.45:
            return {
                "do": "alone",
                "name": chance.choice(_ALONE),
            }
        if what < 0.6:
            eptp = self._payload["ept_pml4"] | 0x1E
            first = chance.choice(
                (eptp, eptp, 0, 1, 0xFFFF, 0x10000, eptp | 1 << 7, eptp | 1 << 50)
            )
            second = chance.choice((0, 0, 0, 1, 1 << 47, 1 << 63))
            name = chance.choice(("invept", "invvpid"))
            kind = chance.choice((0, 1, 1, 2, 2, 3, 4, 1 << 32 | 1, (1 << 64) - 1))
            return {
                "do": "invalidate",
                "name": name,
                "type": kind,
                "first": first,
                "second": second,
            }
        if what < 0.8:
            return self._vmread_or_vmwrite()
        if what < 0.9:
            # Not that of an active VMCS, which software must not write to.
            revision = chance.choice(("good", "shadow", "bad"))
            return {"do": "region", "place": _UNUSED, "revision": revision}
        code, regs = chance.choice(_L1_CODE)
        return {"do": "l1", "code": code.hex(), "regs": dict(regs)}

    def _vmread_or_vmwrite(self) -> Step:
        chance = self._chance
        field = int(chance.choice([field for field in Field if field not in _NOT_IN_KVM]))
        if chance.random() < 0.25:
            field ^= 1 << chance.choice((0, 0, 12, 15, 31, 32, 63, 5))
        known = field in [*Field] and Field(field)
        if known and not self._caps.field_exists(known):
            field = int(Field.GUEST_RIP)
        # Host state and what keeps L2 in L1's hands is left to the other kinds.
        if (known and known.kind not in (Kind.GUEST, Kind.EXIT_INFO)) or chance.random() < 0.5:
            return {"do": "vmread", "field": field}
        value = l2code.value(chance) & (_kept(known) if known else (1 << 64) - 1)
        return {"do": "vmwrite", "field": field, "value": value}


#: FNINIT; MOV DWORD [RDI], 1F80H; LDMXCSR [RDI].
_FLOATS = b"\xdb\xe3\xc7\x07\x80\x1f\x00\x00\x0f\xae\x17"
_ALONE = ("vmxoff", "vmptrst", "vmptrst", "vmfunc")
#: In memory, or beyond the physical-address width.
_ADDRESSES = (0, 0xFFF, 1 << 52, 1 << 63, (1 << 64) - 1, 0x3FF000)


def _wrmsr(index: int, value: int) -> tuple[bytes, tuple[tuple[str, int], ...]]:
    high, low = value >> 32, value & 0xFFFFFFFF
    return b"\x0f\x30", (("rcx", index), ("rax", low), ("rdx", high))


#: Instructions of L1: MOV to control registers that VMX operation restricts, MSRs that L2 gets.
_L1_CODE: tuple[tuple[bytes, tuple[tuple[str, int], ...]], ...] = (
    # MOV RAX, CR4; BTC RAX, 13 (VMXE); MOV CR4, RAX
    (b"\x0f\x20\xe0\x48\x0f\xba\xf8\x0d\x0f\x22\xe0", ()),
    # the same with CR0 and bit 5 (NE), bit 31 (PG), bit 16 (WP), bit 3 (TS)
    *((b"\x0f\x20\xc0\x48\x0f\xba\xf8" + bytes([n]) + b"\x0f\x22\xc0", ()) for n in (5, 31, 16)),
    _wrmsr(0x277, 0x0007040600070406),
    _wrmsr(0x277, 0x0606060606060606),
    _wrmsr(0x174, 0x10),
    _wrmsr(0x175, 0x1234),
    _wrmsr(0xC0000082, 0xFFFF800000001234),
    _wrmsr(0xC0000102, 0x7FFF00001234),
    (b"\x0f\x23\xf8", (("rax", 0x400),)),  # MOV DR7, RAX
    (b"\x0f\x22\xd0", (("rax", 0x12345678),)),  # MOV CR2, RAX
)

#: IA32_APIC_BASE: x2APIC mode, on the first CPU; the APIC enabled by software.
_X2APIC = ((0x1B, 0xFEE00D00), (0x80F, 0x1FF))
#: Of EPT entries: access rights, memory type, ignored and reserved bits.
_EPT_ENTRIES = (
    *(0x30 | rights for rights in range(8)),
    *(rights | kind << 3 for rights in (3, 7) for kind in (0, 1, 2, 3, 4, 5, 7)),
    *(0x37 | 1 << bit for bit in (6, 7, 8, 9, 10, 11, 51, 52, 62)),
)
_MSR_LISTS = (
    ("entry_load_msrs", Field.VM_ENTRY_MSR_LOAD_COUNT),
    ("exit_store_msrs", Field.VM_EXIT_MSR_STORE_COUNT),
    ("exit_load_msrs", Field.VM_EXIT_MSR_LOAD_COUNT),
)
#: Entries of them: the MSR, the reserved part, the value. Some are wrong.
_LISTED = (
    *((0x174, 0, value) for value in (0, 0x10, 0xFFFFFFFF)),
    *((0x175, 0, 0x1234), (0x176, 0, 0x7FFF00001234)),
    *((0xC0000081, 0, 0x0013000800000000), (0xC0000082, 0, 0xFFFF800000001234)),
    *((0xC0000084, 0, 0x700), (0xC0000102, 0, 0x1234), (0x277, 0, 0x0007040600070406)),
    *((0x277, 0, 2), (0x174, 1, 0), (0xC0000100, 0, 0), (0xC0000101, 0, 0)),
    *((0x40000000, 0, 0), (0xC0000082, 0, 1 << 63), (0x800, 0, 0), (0x9B, 0, 0)),
)

_KINDS: tuple[tuple[Callable[[_Draw], Iterator[Step]], int], ...] = (
    (_Draw._new_code, 10),
    (_Draw._again, 8),
    (_Draw._changed, 8),
    (_Draw._state, 6),
    (_Draw._event, 5),
    (_Draw._other_vmcs, 4),
    (_Draw._l1_instructions, 5),
    (_Draw._ept, 4),
    (_Draw._msr_lists, 3),
)


def _kept(field: Field) -> int:
    """Bits of a field that every processor keeps: of access rights not the reserved ones."""
    return 0x1F0FF if field.name.endswith("_ACCESS_RIGHTS") else field.width.mask


def _memory(place: str, content: bytes, *, offset: int = 0, times: int = 1) -> Step:
    where = {"place": place, "offset": offset}
    return {"do": "memory", **where, "bytes": content.hex(), "times": times}
