"""VMCS shadowing with every field encoding: L2 gets what L1 gets from the shadow VMCS itself."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.guest import Masked
from kvmnest.suite.support.shadowing import FLAGS, READ, SHADOW, WRITE, Shadowing
from kvmnest.vmx import ExitReason, Field, Kind, Proc2Ctl, Rflags, Width
from kvmnest.vmx.outcome import Succeed
from kvmnest.vmx.registers import STATUS_FLAGS

pytestmark = [
    pytest.mark.series(13),
    pytest.mark.sdm("VMCS Shadowing Bitmap Addresses"),
    pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING),
]

_CHUNK = 256
_VALUES = 8 * _CHUNK
#: What a VMREAD that fails leaves in its destination.
_KEPT = 0x5AA5F00F5AA5F00F
NO_LINK = 0xFFFFFFFFFFFFFFFF
#: A processor may drop reserved bits of access rights; each failed access writes the error.
_NOT_KEPT = {field for field in Field if field.name.endswith("_ACCESS_RIGHTS")}
_NOT_KEPT.add(Field.VM_INSTRUCTION_ERROR)

#: RSI: encodings, and _VALUES further values; RDI: pairs of value and RFLAGS; RCX: how many.
_HEAD = b"\x48\x8b\x06"  # MOV RAX, [RSI]
_HEAD += b"\x48\x8b\x9e" + struct.pack("<I", _VALUES)  # MOV RBX, [RSI + _VALUES]
_TAIL = b"\x9c\x5a"  # PUSHFQ; POP RDX
_TAIL += b"\x48\x89\x1f\x48\x89\x57\x08"  # MOV [RDI], RBX; MOV [RDI + 8], RDX
_TAIL += b"\x48\x83\xc6\x08\x48\x83\xc7\x10\x48\xff\xc9"  # ADD RSI, 8; ADD RDI, 16; DEC RCX


def _loop(instruction: bytes) -> bytes:
    body = _HEAD + instruction + _TAIL
    return body + b"\x0f\x85" + struct.pack("<i", -len(body) - 6)  # JNZ to the beginning


class _Sweep:
    """All encodings of fields up to the highest index, with a value for each."""

    def __init__(self, l1: L1) -> None:
        self.l1, self.shadowing = l1, Shadowing(l1)
        self.inputs, self.outputs = l1.alloc(), l1.alloc()
        indices = range(l1.caps.vmcs_enum_max_index + 1)
        self.encodings = [
            Field.encode(width, kind, index) | high
            for width, kind, index, high in itertools.product(Width, Kind, indices, (0, 1))
        ]

    def __repr__(self) -> str:
        return f"<{len(self.encodings)} encodings>"

    def value(self, encoding: int) -> int:
        """A value with other bits than those of its neighbours."""
        return (encoding + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1

    def _chunks(self, values: bool) -> Iterator[dict[str, int]]:
        """Fill the inputs, and give the registers with which the loops read them."""
        for start in range(0, len(self.encodings), _CHUNK):
            part = self.encodings[start : start + _CHUNK]
            given = [self.value(e) if values else _KEPT for e in part]
            self.l1.write(self.inputs, struct.pack(f"<{len(part)}Q", *part))
            self.l1.write(self.inputs + _VALUES, struct.pack(f"<{len(part)}Q", *given))
            yield {"rsi": self.inputs, "rdi": self.outputs, "rcx": len(part)}

    def _results(self, count: int) -> list[tuple[int, int]]:
        """The value and status flags that each access left."""
        words = struct.unpack(f"<{2 * count}Q", self.l1.read(self.outputs, 16 * count))
        pairs = zip(words[::2], words[1::2], strict=True)
        return [(value, flags & STATUS_FLAGS) for value, flags in pairs]

    def in_l2(self, instruction: bytes) -> list[tuple[int, int]]:
        """Execute it for each encoding in L2."""
        seen: list[tuple[int, int]] = []
        for regs in self._chunks(instruction is WRITE):
            assert self.shadowing.guest.run(_loop(instruction), regs) == Succeed()
            seen += self._results(regs["rcx"])
        return seen

    def in_l1(self, instruction: bytes, region: int) -> list[tuple[int, int]]:
        """Execute it for each encoding in L1, the VMCS in ``region`` being current."""
        l1, seen = self.l1, []
        assert l1.vmptrld(region) == Succeed()
        for regs in self._chunks(instruction is WRITE):
            assert l1.call(_loop(instruction), regs=regs) == Succeed()
            seen += self._results(regs["rcx"])
        assert l1.vmclear(region) == Succeed()
        assert l1.vmptrld(self.shadowing.guest.vmcs.address) == Succeed()
        return seen

    def differences(self, one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[str]:
        """Encodings whose value or flags differ."""
        rows = zip(self.encodings, one, other, strict=True)
        return [
            f"{e:#x}: {a[0]:#x} {a[1]:#x}, L1: {b[0]:#x} {b[1]:#x}" for e, a, b in rows if a != b
        ]


def test_read(l1: L1) -> None:
    """VMREAD of L2 gives value and flags of L1's VMREAD, for fields that exist and all others."""
    sweep = _Sweep(l1)
    region = sweep.shadowing.region
    written = sweep.in_l1(WRITE, region)
    expected = sweep.in_l1(READ, region)
    assert sweep.differences(sweep.in_l2(READ), expected) == []
    exist = [flags == 0 for _, flags in expected]
    assert 100 < sum(exist) < len(exist)
    # What a field holds is what was written to it, and a failed VMREAD stores nothing.
    rows = zip(sweep.encodings, written, expected, strict=True)
    for encoding, (_, refused), (value, failed) in rows:
        width = Width(encoding >> 13 & 3)
        whole = not encoding & 1 and width is not Width.BITS64
        if failed:
            assert (value, failed) == (_KEPT, Rflags.ZF), hex(encoding)
        elif not refused and whole and encoding not in _NOT_KEPT:
            assert value == sweep.value(encoding) & width.mask, hex(encoding)


def test_write(l1: L1) -> None:
    """VMWRITE of L2 leaves the flags and the shadow VMCS that L1's VMWRITEs leave another."""
    sweep = _Sweep(l1)
    twin = l1.sym("vmcs_b")
    l1.prepare_region(twin, l1.caps.basic.revision_id | SHADOW)
    assert l1.vmclear(twin) == Succeed()
    expected = sweep.in_l1(WRITE, twin)
    assert sweep.differences(sweep.in_l2(WRITE), expected) == []
    kept = sweep.in_l1(READ, twin)
    assert sweep.differences(sweep.in_l1(READ, sweep.shadowing.region), kept) == []
    assert {flags for _, flags in expected} == {0, int(Rflags.ZF)}


@pytest.mark.parametrize("instruction", [READ, WRITE], ids=["vmread", "vmwrite"])
def test_without_link_pointer(l1: L1, instruction: bytes) -> None:
    """Without a shadow VMCS each access is VMfailInvalid, whether the field exists or not."""
    sweep = _Sweep(l1)
    sweep.shadowing.guest.vmcs[Field.VMCS_LINK_POINTER] = NO_LINK
    seen = sweep.in_l2(instruction)
    assert {flags for _, flags in seen} == {int(Rflags.CF)}
    if instruction is READ:
        assert {value for value, _ in seen} == {_KEPT}


@pytest.mark.parametrize("instruction", [READ, WRITE], ids=["vmread", "vmwrite"])
def test_exits(l1: L1, instruction: bytes) -> None:
    """With all bits of its bitmap set every encoding exits, and with those of the other none."""
    sweep = _Sweep(l1)
    shadowing, reads = sweep.shadowing, instruction is READ
    everything = range(0x8000)
    shadowing.exits((), everything) if reads else shadowing.exits(everything, ())
    assert {flags for _, flags in sweep.in_l2(instruction)} <= {0, int(Rflags.ZF)}
    shadowing.exits(everything, ()) if reads else shadowing.exits((), everything)
    reason = ExitReason.VMREAD if reads else ExitReason.VMWRITE
    highest = l1.caps.vmcs_enum_max_index
    unchecked = Masked(0, 0)
    for width, kind, index, high in itertools.product(Width, Kind, (0, highest), (0, 1)):
        encoding = Field.encode(width, kind, index) | high
        seen = shadowing.guest.run(instruction + FLAGS, {"rax": encoding, "rbx": 1})
        expected = shadowing.guest.exit(reason, 3, qualification=unchecked, info=unchecked)
        assert seen == expected, hex(encoding)
