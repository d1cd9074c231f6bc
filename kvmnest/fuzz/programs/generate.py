"""Programs of a seed: what L1 and its host do, in an order that may be a wrong one."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvmnest.fuzz.generate import Generator
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.model import FuzzCase, base_memory, modes
from kvmnest.fuzz.programs import l2code
from kvmnest.fuzz.programs.base import base_vmcs
from kvmnest.fuzz.programs.contents import EPT_ENTRIES, LISTED, MSR_LISTS, STORE, X2APIC
from kvmnest.fuzz.programs.controls import Controls, fields_step, memory_step
from kvmnest.fuzz.programs.l1code import REGIONS, L1Code, kept, wrmsr
from kvmnest.fuzz.programs.program import HOST_ACTIONS, Program, Step
from kvmnest.l1.baseline import L2Mode
from kvmnest.vmx import (
    Capabilities,
    EptVpidCap,
    Field,
    Proc2Ctl,
    ProcCtl,
)
from kvmnest.vmx.fields import Kind

_BITS = {L2Mode.LONG: 64, L2Mode.REAL: 16}
#: Left to the fuzzer of entries: what Bochs does not have, whose reserved bits it does not know,
#: what depends on a machine's revision identifier.
_NOT_COMPARED = {
    *(Field.GUEST_IA32_PERF_GLOBAL_CTRL, Field.HOST_IA32_PERF_GLOBAL_CTRL),
    *(Field.GUEST_IA32_DEBUGCTL, Field.VMCS_LINK_POINTER),
}
#: Controls that a VMCS of this fuzzer keeps.
_WATCHED: Mapping[Field, ProcCtl | Proc2Ctl] = {
    Field.CPU_BASED_VM_EXEC_CONTROL: ProcCtl.HLT_EXITING
    | ProcCtl.UNCONDITIONAL_IO_EXITING
    | ProcCtl.RDTSC_EXITING
    | ProcCtl.RDPMC_EXITING,
    Field.SECONDARY_VM_EXEC_CONTROL: Proc2Ctl.RDRAND_EXITING | Proc2Ctl.RDSEED_EXITING,
}
_REGS = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r15")
#: INVEPT of all contexts.
FLUSH: Step = {"do": "invalidate", "name": "invept", "type": 2, "first": 0, "second": 0}


class ProgramGenerator:
    """Draws programs for a machine with these capabilities, all chance from the seed.

    ``host``: wherever they run there is KVM, so that L2 may wait for its host, and L1 may have a
    second vCPU. ``others``: what the machines have on which they run; a VMCS that is legal on one
    only is left out.
    """

    def __init__(
        self, judge: Judge, *, host: bool = False, others: Sequence[Capabilities] = ()
    ) -> None:
        self._judge, self._caps, self._payload = judge, judge.caps, judge.payload
        self.host, self._others = host, others
        self._vmcss = Generator(judge)
        self._modes = tuple(modes(judge.caps, judge.payload))

    def numbered(self, seed: int, number: int) -> Program:
        """Program ``number`` of a seed, always the same one."""
        return self.draw(random.Random(f"kvmnest program {seed} {number}"))

    def alike(self, case: FuzzCase) -> bool:
        """Whether the rules say the same of a VMCS on all machines."""
        wanted = self._judge.violations(case)
        return all(self._judge.violations(case, caps) == wanted for caps in self._others)

    def draw(self, chance: random.Random) -> Program:
        """Draw one program."""
        weights = [8 if mode is L2Mode.LONG else 2 for mode in self._modes]
        mode = chance.choices(self._modes, weights)[0]
        return Program(tuple(_Draw(self, chance, mode).steps()))


class _Draw(L1Code):
    """One program that is being drawn."""

    def __init__(self, generator: ProgramGenerator, chance: random.Random, mode: L2Mode) -> None:
        super().__init__(chance, generator._caps, generator._payload)
        self._mode = mode
        self._vmcss, self._alike = generator._vmcss, generator.alike
        self._base = base_vmcs(self._caps, self._payload, mode)
        self._apic = chance.random() < 0.25
        self._host = generator.host
        of_bits = l2code.Machine.of(self._payload, _BITS.get(mode, 32), self._caps.cr4_fixed1)
        paged = mode not in (L2Mode.REAL, L2Mode.UNPAGED)
        self._machine = replace(of_bits, paged=paged, apic=self._apic, pauses=self._host)
        self._launched = self._apic_on = False
        self._region = "vmcs_a"
        where = {"host": self._host, "apic": self._apic}
        self._controls = Controls(chance, self._caps, self._base, **where)

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
        if self._apic_on and what < 0.4:
            kind = chance.choice(("interrupt", "interrupt", "NMI"))
            return {"do": "event", "what": kind, "vector": chance.choice((0x31, 0x51, 0xF1))}
        return {"do": "host", "what": chance.choice((*HOST_ACTIONS, "new VM"))}

    def _drawn(self) -> Iterator[Step]:
        chance = self._chance
        if chance.random() < 0.12:
            yield from self._l1_instructions(chance.randint(1, 5))
        if self._apic:
            for msr, number in X2APIC:
                code, regs = wrmsr(msr, number)
                yield {"do": "l1", "code": code.hex(), "regs": dict(regs)}
            self._apic_on = True
        # Bochs has another IA32_FMASK after reset.
        code, regs = wrmsr(0xC0000084, 0)
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

    def _load(self, region: str) -> Iterator[Step]:
        """A VMCS with L2's code, ready for VMLAUNCH."""
        yield {"do": "region", "place": region, "revision": "good"}
        yield self._address("vmclear", region)
        yield self._address("vmptrld", region)
        yield {"do": "base", "mode": self._mode.name}
        yield from self._code()
        self._launched, self._region = False, region
        if self._chance.random() < 0.75:
            yield from self._controls.steps()
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

    def _fields(self, fields: Mapping[Field, int]) -> Step:
        return fields_step(self._caps, fields)

    def _again(self) -> Iterator[Step]:
        yield from self._controls.steps()
        yield self._fields({Field.GUEST_RIP: self._base[Field.GUEST_RIP]})
        yield from self._new_code()

    def _changed(self) -> Iterator[Step]:
        """A VMCS of the present fuzzer, entered, and taken back."""
        case = self._vmcss.draw(self._chance)
        if case.mode is not self._mode or _NOT_COMPARED & case.changes.keys():
            return
        if not self._alike(case) or self._nowhere(case):
            return
        if case.changes.get(Field.VM_ENTRY_INTR_INFO_FIELD, 0) >> 8 & 7 == 5:
            return  # INT1, which KVM is known to lose
        targets = case.changes.get(Field.CR3_TARGET_COUNT, 0)
        if self._caps.misc.cr3_targets < targets < 1 << 31:
            return
        cr4 = case.changes.get(Field.GUEST_CR4, 0) | case.changes.get(Field.HOST_CR4, 0)
        if cr4 & 0xFFFFFFFF & ~(self._caps.cr4_fixed1 | l2code.CR4_RESERVED):
            return
        for label, content in case.memory.items():
            yield memory_step(label, content)
        for label, content in base_memory().items():
            if label not in case.memory:
                yield memory_step(label, content)
        changes = {f: v & kept(f) for f, v in case.changes.items()}
        for field in (Field.CPU_BASED_VM_EXEC_CONTROL, Field.SECONDARY_VM_EXEC_CONTROL):
            if field in changes:
                # What would give another value on every machine still exits.
                changes[field] |= self._base[field] & _WATCHED[field].value
        yield self._fields(changes)
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
        entry = page & ~0xFFF | chance.choice(EPT_ENTRIES)
        where = payload["ept_pml4_pt"] + (page >> 12) * 8
        yield self._store(where, entry)
        yield FLUSH
        yield from self._code()
        yield from self._enter()
        yield self._store(where, page & ~0xFFF | 0x37)
        yield FLUSH
        yield from self._enter()

    def _store(self, address: int, value: int) -> Step:
        """L1 writes into its tables itself: KVM does not see what its process writes there."""
        return {"do": "l1", "code": STORE.hex(), "regs": {"rdi": address, "rax": value}}

    def _msr_lists(self) -> Iterator[Step]:
        """Lists of MSRs that VM entry loads and VM exit stores and loads."""
        chance = self._chance
        for place, count in MSR_LISTS:
            entries = [chance.choice(LISTED) for _ in range(chance.randint(1, 4))]
            content = b"".join(struct.pack("<IIQ", *entry) for entry in entries)
            yield memory_step(place, content)
            yield self._fields({count: chance.choice((len(entries), len(entries), 0))})
        yield from self._new_code()
        yield self._fields({count: 0 for _, count in MSR_LISTS})

    def _nowhere(self, case: FuzzCase) -> bool:
        """Whether an address that KVM itself has to use is one where L1 has no memory."""
        size = self._payload["RAM_SIZE"]
        fields = (Field.APIC_ACCESS_ADDR, Field.VIRTUAL_APIC_PAGE_ADDR, Field.EPT_POINTER)
        return any(case.changes.get(field, 0) >= size for field in fields)

    def _leave(self) -> Iterator[Step]:
        """VMXOFF and VMXON; what VMXOFF leaves of an active VMCS is not defined."""
        for region in REGIONS:
            yield self._address("vmclear", region)
        yield {"do": "alone", "name": "vmxoff"}
        if self._chance.random() < 0.3:
            yield from self._l1_instructions(1)
        yield {"do": "region", "place": "vmxon_region", "revision": "good"}
        yield self._address("vmxon", "vmxon_region")
        yield from self._load(self._chance.choice(REGIONS))

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


#: FNINIT; MOV DWORD [RDI], 1F80H; LDMXCSR [RDI].
_FLOATS = b"\xdb\xe3\xc7\x07\x80\x1f\x00\x00\x0f\xae\x17"
_KINDS: tuple[tuple[Callable[[_Draw], Iterator[Step]], int], ...] = (
    (_Draw._new_code, 10),
    (_Draw._again, 8),
    (_Draw._changed, 8),
    (_Draw._state, 6),
    (_Draw._event, 5),
    (_Draw._other_vmcs, 4),
    (_Draw._l1_instructions, 5),
    (_Draw._ept, 4),
    (_Draw._leave, 1),
    (_Draw._msr_lists, 3),
)
