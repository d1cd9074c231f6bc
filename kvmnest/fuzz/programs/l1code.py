"""Instructions of L1: VMX instructions with good and bad operands, and what L2 inherits."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvmnest.fuzz.programs import l2code
from kvmnest.fuzz.programs.program import Step
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, EptVpidCap, Field
from kvmnest.vmx.fields import Kind

REGIONS = ("vmcs_a", "vmcs_b", "vmcs_c")
#: A region that no VMCS of a program is in.
_UNUSED = "vmcs_d"
#: Fields that no capability reports and KVM does not have.
_NOT_IN_KVM = (
    *(Field.EXECUTIVE_VMCS_POINTER, Field.GUEST_SMBASE, Field.IO_RCX, Field.IO_RSI),
    *(Field.IO_RDI, Field.IO_RIP),
)
#: What makes INVEPT and INVVPID valid (SDM, their pages).
_TAKES = {"invept": EptVpidCap.INVEPT, "invvpid": EptVpidCap.INVVPID}
_ALONE = ("vmptrst", "vmptrst", "vmfunc")
#: In memory, or beyond the physical-address width.
_ADDRESSES = (0, 0xFFF, 1 << 52, 1 << 63, (1 << 64) - 1, 0x3FF000)


def wrmsr(index: int, value: int) -> tuple[bytes, tuple[tuple[str, int], ...]]:
    """WRMSR, and the registers before it."""
    high, low = value >> 32, value & 0xFFFFFFFF
    return b"\x0f\x30", (("rcx", index), ("rax", low), ("rdx", high))


#: Instructions of L1: MOV to control registers that VMX operation restricts, MSRs that L2 gets.
_L1_CODE: tuple[tuple[bytes, tuple[tuple[str, int], ...]], ...] = (
    # MOV RAX, CR4; BTC RAX, 13 (VMXE); MOV CR4, RAX
    (b"\x0f\x20\xe0\x48\x0f\xba\xf8\x0d\x0f\x22\xe0", ()),
    # the same with CR0 and bit 5 (NE), bit 31 (PG), bit 16 (WP), bit 3 (TS)
    *((b"\x0f\x20\xc0\x48\x0f\xba\xf8" + bytes([n]) + b"\x0f\x22\xc0", ()) for n in (5, 31, 16)),
    wrmsr(0x277, 0x0007040600070406),
    wrmsr(0x277, 0x0606060606060606),
    wrmsr(0x174, 0x10),
    wrmsr(0x175, 0x1234),
    wrmsr(0xC0000082, 0xFFFF800000001234),
    wrmsr(0xC0000102, 0x7FFF00001234),
    (b"\x0f\x23\xf8", (("rax", 0x400),)),  # MOV DR7, RAX
    (b"\x0f\x22\xd0", (("rax", 0x12345678),)),  # MOV CR2, RAX
)


def kept(field: Field) -> int:
    """Bits of a field that every processor keeps: of access rights not the reserved ones."""
    return 0x1F0FF if field.name.endswith("_ACCESS_RIGHTS") else field.width.mask


class L1Code:
    """Draws single instructions."""

    def __init__(self, chance: random.Random, caps: Capabilities, payload: Payload) -> None:
        self._chance, self._caps, self._payload = chance, caps, payload

    def _address(self, name: str, place: str, offset: int = 0) -> Step:
        return {"do": "address", "name": name, "place": place, "offset": offset}

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
            first = chance.choice((eptp, eptp, 0, 1, 0xFFFF, 0x10000, eptp | 1 << 50))
            second = chance.choice((0, 0, 0, 1, 1 << 47, 1 << 63))
            name = chance.choice(("invept", "invvpid"))
            if not self._caps.supports(_TAKES[name]):
                # A program asks for nothing that one of its machines does not have.
                return {"do": "alone", "name": "vmptrst"}
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
        value = l2code.value(chance) & (kept(known) if known else (1 << 64) - 1)
        return {"do": "vmwrite", "field": field, "value": value}
