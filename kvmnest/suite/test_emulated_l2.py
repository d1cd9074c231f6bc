"""Instructions of L2 that KVM emulates instead of the CPU: L1's intercepts still hold.

KVM's emulator gets an instruction of L2 when it accesses memory that is not there (MMIO), when
it is a string I/O instruction, and, with ``kvm.force_emulation_prefix=1``, behind the prefix
UD2 "kvm". What L2 and L1 see must not depend on who executes.
"""

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit, MmioExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.emulation import PREFIX, forced
from kvmnest.suite.support.entries import BAD_GUEST, address_bits
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitReason, Field, IoQualification, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Fault, HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Instructions That Cause VM Exits Conditionally"),
]

__all__ = ["forced"]

PORT = 0x3F8
SGDT = b"\x0f\x01\x07"  # SGDT [RDI]
STR = b"\x0f\x00\xc8"  # STR EAX
#: A guest-physical address without memory.
NOWHERE = 0x10000000


def _run(guest: Guest, instruction: bytes, **regs: int) -> Outcome:
    return guest.run(PREFIX + instruction, regs)


INTERCEPTS = {
    "HLT": (code.HLT, ProcCtl.HLT_EXITING, ExitReason.HLT),
    "RDTSC": (code.RDTSC, ProcCtl.RDTSC_EXITING, ExitReason.RDTSC),
    "SGDT": (SGDT, Proc2Ctl.DESCRIPTOR_TABLE_EXITING, ExitReason.GDTR_IDTR),
    "STR": (STR, Proc2Ctl.DESCRIPTOR_TABLE_EXITING, ExitReason.LDTR_TR),
    "WBINVD": (code.WBINVD, Proc2Ctl.WBINVD_EXITING, ExitReason.WBINVD),
    "PAUSE": (code.PAUSE, ProcCtl.PAUSE_EXITING, ExitReason.PAUSE),
}


_WITH_CONTROL = [
    pytest.param(name, marks=pytest.mark.needs(control))
    for name, (_, control, _) in INTERCEPTS.items()
]


@pytest.mark.parametrize("name", _WITH_CONTROL)
def test_intercept_exits(l1: L1, forced: bytes, name: str) -> None:
    """An instruction that L1 intercepts exits to L1 when KVM emulates it, too."""
    instruction, control, reason = INTERCEPTS[name]
    guest = Guest(l1, control)
    seen = _run(guest, instruction, rdi=l1.sym("l2_data"))
    assert seen == guest.exit(reason, len(instruction), offset=len(forced))
    assert guest.changed(seen) == {}


@pytest.mark.parametrize("name", _WITH_CONTROL)
def test_intercept_is_not_passed_by(l1: L1, forced: bytes, name: str) -> None:
    """Whatever becomes of an emulated instruction that L1 intercepts, L2 does not execute it."""
    instruction, control, _ = INTERCEPTS[name]
    guest = Guest(l1, control)
    data = l1.sym("l2_data")
    l1.write(data, b"\xee" * 16)
    seen = _run(guest, instruction, rdi=data)
    assert not isinstance(seen, Succeed | HostExit)
    assert guest.changed(seen) == {}
    assert l1.read(data, 16) == b"\xee" * 16


@pytest.mark.parametrize("name", ["RDTSC", "SGDT", "STR", "WBINVD", "PAUSE"])
def test_executes_without_intercept(l1: L1, forced: bytes, name: str) -> None:
    """An instruction that L1 does not intercept executes in KVM's emulator as in the CPU."""
    instruction, _, _ = INTERCEPTS[name]
    guest = Guest(l1)
    data = l1.sym("l2_data")
    seen = _run(guest, instruction, rdi=data, rax=0, rdx=0)
    assert seen == Succeed()
    if name == "SGDT":
        assert l1.read_int(data + 2) == l1.sym("l1_gdt")
    elif name == "STR":
        assert seen.regs["rax"] == l1.sym("SEL_TSS_L2")


def test_nop_is_not_pause(l1: L1, forced: bytes) -> None:
    """An emulated NOP, whose opcode PAUSE shares, does not exit with "PAUSE exiting"."""
    guest = Guest(l1, ProcCtl.PAUSE_EXITING)
    seen = _run(guest, code.NOP)
    assert seen == Succeed()
    assert guest.changed(seen) == {}


OUTS = {"OUT": b"\xee", "OUTSB": b"\x6e"}


@pytest.mark.parametrize("name", OUTS)
def test_io_reaches_userspace(l1: L1, forced: bytes, name: str) -> None:
    """Emulated I/O that L1 does not want goes to userspace."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [PORT - 1, PORT + 1])
    data = l1.sym("l2_data")
    l1.write(data, b"\x21")
    seen = _run(guest, OUTS[name], rdx=PORT, rax=0x21, rsi=data)
    assert seen == HostExit(IoExit(IO_OUT, 1, PORT, 1, b"\x21"))
    assert guest.resume() == Succeed()


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("bitmaps", [False, True], ids=["unconditional", "bitmaps"])
def test_io_exits(l1: L1, forced: bytes, name: str, bitmaps: bool) -> None:
    """Emulated I/O that L1 intercepts exits to L1."""
    guest = _intercept_port(l1, bitmaps)
    data = l1.sym("l2_data")
    seen = _run(guest, OUTS[name], rdx=PORT, rsi=data)
    qualification = IoQualification(1, False, PORT, string=name == "OUTSB").encode()
    assert seen == guest.exit(
        ExitReason.IO_INSTRUCTION, 1, offset=len(forced), qualification=qualification
    )


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("bitmaps", [False, True], ids=["unconditional", "bitmaps"])
def test_io_is_not_passed_by(l1: L1, forced: bytes, name: str, bitmaps: bool) -> None:
    """Emulated I/O that L1 intercepts does not reach userspace."""
    guest = _intercept_port(l1, bitmaps)
    seen = _run(guest, OUTS[name], rdx=PORT, rsi=l1.sym("l2_data"))
    assert not isinstance(seen, HostExit | Succeed)
    assert guest.changed(seen) == {}


def _intercept_port(l1: L1, bitmaps: bool) -> Guest:
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS if bitmaps else ProcCtl.UNCONDITIONAL_IO_EXITING)
    set_io_bitmaps(l1, [PORT])
    return guest


def test_plain_instructions(l1: L1, forced: bytes) -> None:
    """Emulated instructions without any intercept have their effect, and faults go to L2."""
    guest = Guest(l1)
    data = l1.sym("l2_data")
    l1.write_int(data, 0x1122334455667788)
    seen = _run(guest, b"\x48\x8b\x07", rdi=data)  # MOV RAX, [RDI]
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 0x1122334455667788}
    seen = _run(guest, b"\x48\x01\x07", rdi=data, rax=1)  # ADD [RDI], RAX
    assert seen == Succeed()
    assert l1.read_int(data) == 0x1122334455667789
    seen = _run(guest, b"\x48\x8b\x07", rdi=0x50000008)
    assert seen == Fault(Vector.PF, error_code=0, cr2=0x50000008, rip=len(forced))
    seen = guest.run(PREFIX + b"\x48\x8b\x07", {"rdi": 0x50000008}, EXCEPTION_BITMAP=1 << Vector.PF)
    assert seen == guest.exception(Vector.PF, 0, offset=len(forced), qualification=0x50000008)


# --- the emulator without the prefix ---


@pytest.mark.sdm("EPT Translation Mechanism")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_mmio(l1: L1) -> None:
    """An access of L2 to memory that nobody backs reaches userspace, and completes in L2."""
    guest = Guest(l1)
    seen = guest.run(b"\x89\x07", {"rdi": NOWHERE, "rax": 0x12345678})  # MOV [RDI], EAX
    assert seen == HostExit(MmioExit(NOWHERE, 4, True, b"\x78\x56\x34\x12"))
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {}
    seen = guest.run(b"\x8b\x47\x10", {"rdi": NOWHERE})  # MOV EAX, [RDI+16]
    assert seen == HostExit(MmioExit(NOWHERE + 16, 4, False, b""))
    l1.vcpu.set_mmio_data(b"\xef\xbe\xad\xde")
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 0xDEADBEEF}


def test_pause_behind_a_stale_translation(l1: L1) -> None:
    """L2 remaps its code page without INVLPG: OUTSB and PAUSE are both possible, no third.

    The CPU may still execute OUTSB of the old page; KVM, which emulates that, finds PAUSE of the
    new one. "PAUSE exiting" is 1, so PAUSE cannot just complete.
    """
    guest = Guest(l1, ProcCtl.PAUSE_EXITING)
    store = b"\x48\x89\x07"  # MOV [RDI], RAX: the page-table entry
    new = l1.alloc()
    l1.write(new, store + code.PAUSE + code.VMCALL)
    entry = l1.sym("l2_pml4_pt") + l1.sym("l2_code") // 4096 * 8
    regs = {"rdi": entry, "rax": new | 0x67, "rdx": PORT, "rsi": l1.sym("l2_data")}
    l1.write(l1.sym("l2_data"), b"\x21")
    seen = guest.run(store + b"\x6e" + code.NOP, regs)
    outs = HostExit(IoExit(IO_OUT, 1, PORT, 1, b"\x21"))
    pause = guest.exit(ExitReason.PAUSE, 2, offset=len(store))
    assert seen in (outs, pause)


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
@pytest.mark.parametrize("name", ["offset", "multiplier", "both"])
def test_tsc_of_l1_after_a_failed_entry(l1: L1, forced: bytes, name: str) -> None:
    """An emulated RDTSC of L1 knows nothing of L2's TSC when an entry has failed."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
    guest.vmcs[Field.TSC_OFFSET] = 0 if name == "multiplier" else 1 << 50
    guest.vmcs[Field.TSC_MULTIPLIER] = 1 << 48 if name == "offset" else 1 << 52
    bad = guest.vmcs[Field.GUEST_CR3] | 1 << address_bits(l1)[0]
    assert guest.run(code.NOP, GUEST_CR3=bad) == BAD_GUEST
    times = []
    for instruction in (code.RDTSC, PREFIX + code.RDTSC, code.RDTSC):
        seen = l1.call(instruction)
        assert seen == Succeed()
        times.append(seen.regs["rdx"] << 32 | seen.regs["rax"])
    assert times == sorted(times)
