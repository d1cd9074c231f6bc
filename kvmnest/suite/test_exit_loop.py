"""Very many exits through a handler of L1's own, without userspace in between."""

from __future__ import annotations

import struct

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr4, ExitReason, Field
from kvmnest.vmx.outcome import Succeed

pytestmark = [
    pytest.mark.series(22),
    pytest.mark.sdm("Changes to Instruction Behavior in VMX Non-Root Operation"),
]

#: MOV RAX, CR4; XOR RAX, 80H (PGE); MOV CR4, RAX; JMP to the first.
TOGGLE_PGE = b"\x0f\x20\xe0" + b"\x48\x35\x80\x00\x00\x00" + b"\x0f\x22\xe0" + b"\xeb\xf2"
_AT_WRITE = 9


def _select(field: Field) -> bytes:
    return b"\xba" + struct.pack("<I", field)  # MOV EDX, field


#: L1's handler. R14: the value that L2 has to write next; R15: how many exits are left.
HANDLER = b"".join(
    (
        b"\x49\x81\xf6\x80\x00\x00\x00",  # XOR R14, 80H
        b"\x4c\x39\xf0",  # CMP RAX, R14
        b"\x75\x2d",  # JNE to the end
        _select(Field.CR4_READ_SHADOW) + b"\x0f\x79\xd0",  # VMWRITE RDX, RAX
        b"\x48\x0d" + struct.pack("<I", Cr4.VMXE),  # OR RAX, VMXE
        _select(Field.GUEST_CR4) + b"\x0f\x79\xd0",
        _select(Field.GUEST_RIP) + b"\x0f\x78\xd0",  # VMREAD RAX, RDX
        b"\x48\x83\xc0\x03",  # ADD RAX, 3
        b"\x0f\x79\xd0",
        b"\x49\xff\xcf",  # DEC R15
        b"\x74\x03",  # JZ to the end
        code.VMRESUME,
    )
)


def test_cr4_changes_at_every_exit(l1: L1) -> None:
    """L2 toggles CR4.PGE, L1 writes CR4 and its read shadow at each exit; L2 sees each value.

    What L2 writes next is what it read, with PGE inverted: it never sees a stale value, nor
    CR4.VMXE, which the shadow has clear.
    """
    rounds = 2_000
    guest = Guest(l1)
    vmcs = guest.vmcs
    shadow = vmcs[Field.GUEST_CR4] & ~(Cr4.VMXE | Cr4.PGE)
    vmcs[Field.CR4_GUEST_HOST_MASK] = Cr4.PGE | Cr4.VMXE
    vmcs[Field.CR4_READ_SHADOW] = shadow
    seen = guest.run(TOGGLE_PGE)
    assert seen == guest.exit(ExitReason.CR_ACCESS, 3, offset=_AT_WRITE, qualification=4)
    assert seen.regs["rax"] == shadow ^ Cr4.PGE
    start = l1.sym("snippet_code")
    vmcs[Field.HOST_RIP] = start + len(code.VMRESUME)
    vmcs[Field.HOST_RSP] = l1.sym("snippet_stack_top")
    vmcs.flush()
    # L2 writes the same value again at first.
    done = l1.call(
        code.VMRESUME + HANDLER, regs={"rax": shadow ^ Cr4.PGE, "r14": shadow, "r15": rounds}
    )
    assert done == Succeed()
    assert done.regs["r15"] == 0, f"stopped with RAX={done.regs['rax']:#x}"
    last = shadow if rounds % 2 == 0 else shadow ^ Cr4.PGE
    assert vmcs.read(Field.CR4_READ_SHADOW, Field.GUEST_CR4) == (last, last | Cr4.VMXE)
