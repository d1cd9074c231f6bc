"""L2 takes page faults in a loop while its VM is replaced again and again, wherever it is then."""

from __future__ import annotations

import struct
import threading

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.entries import EPT_OR_NOT
from kvmnest.suite.support.guest import Guest, copied_idt
from kvmnest.vmx import Field, Vector
from kvmnest.vmx.outcome import HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery"),
    pytest.mark.needs(Cap.NESTED_STATE),
]

_UNMAPPED = 0x50000000
_BEGIN, _END = 0x80, 0x81
#: loop: INC R9; MOV RAX, [RDI]; CMP DWORD [RSI], 0; JE loop.
_LOOP = b"\x49\xff\xc1" + b"\x48\x8b\x07" + b"\x83\x3e\x00" + b"\x74\xf5"
#: Skips the access, if CR2 is RDI: MOV RBX, CR2; CMP RBX, RDI; JNE bad; INC R8;
#: ADD QWORD [RSP+8], 3; ADD RSP, 8; IRETQ; bad: UD2.
_HANDLER = (
    b"\x0f\x20\xd3\x48\x39\xfb\x75\x0f\x49\xff\xc0"
    b"\x48\x83\x44\x24\x08\x03\x48\x83\xc4\x08\x48\xcf" + code.UD2
)


def _own_handler(l1: L1, guest: Guest) -> None:
    """Give L2 an IDT whose page-fault gate leads to ``_HANDLER``."""
    page, table = l1.alloc(), copied_idt(l1)
    l1.write(page, _HANDLER)
    gate = struct.pack("<HHHHII", page & 0xFFFF, l1.sym("SEL_CODE64"), 0x8E00, page >> 16, 0, 0)
    l1.write(table + 16 * Vector.PF, gate)
    guest.vmcs[Field.GUEST_IDTR_BASE] = table


def _port(seen: exits.Exit) -> int:
    assert isinstance(seen, exits.IoExit), seen
    return seen.port


@EPT_OR_NOT
def test_page_faults(l1: L1, ept: bool) -> None:
    """No page fault is lost, taken twice or given another address: as many handled as caused."""
    moves = 12
    guest = Guest(l1, ept=ept)
    _own_handler(l1, guest)
    stop = l1.alloc()
    regs = {"rdi": _UNMAPPED, "rsi": stop, "r8": 0, "r9": 0}
    seen = guest.run(code.out8(_BEGIN) + _LOOP + code.out8(_END), regs)
    assert isinstance(seen, HostExit)
    assert _port(seen.exit) == _BEGIN
    before = 0
    for number in range(moves):
        vcpu = l1.vcpu
        kick = threading.Timer(0.004 + 0.0007 * number, vcpu.kick)
        kick.start()
        assert isinstance(vcpu.run(), exits.IntrExit)
        kick.join()
        now = vcpu.get_regs()
        # R9 counts the accesses, R8 the faults that the handler has seen so far.
        assert now.r9 - now.r8 in (0, 1), number
        assert now.r9 > before, number
        before = now.r9
        l1.round_trip()
    l1.write_int(stop, 1)
    assert _port(l1.vcpu.run()) == _END
    seen = guest.resume()
    assert seen == Succeed()
    assert seen.regs["r8"] == seen.regs["r9"] >= before
    assert seen.regs["rbx"] == _UNMAPPED
