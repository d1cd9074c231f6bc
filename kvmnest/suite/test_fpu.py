"""CR0.TS, #NM and lazy FPU switching as L2 sees them; FPU state across entries and exits."""

import itertools
import struct

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Cr4, ExitReason, Field, Vector
from kvmnest.vmx.outcome import Fault, HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(23),
    pytest.mark.sdm("Guest/Host Masks and Read Shadows for CR0 and CR4"),
]

FNINIT = b"\xdb\xe3"
WAIT = b"\x9b"
EMMS = b"\x0f\x77"
MOVAPS = b"\x0f\x28\xc1"  # MOVAPS XMM0, XMM1
LOAD_XMM0 = b"\x0f\x10\x07"  # MOVUPS XMM0, [RDI]
STORE_XMM0 = b"\x0f\x11\x07"  # MOVUPS [RDI], XMM0
FXSAVE = b"\x48\x0f\xae\x07"  # FXSAVE64 [RDI]
FXRSTOR = b"\x48\x0f\xae\x0f"  # FXRSTOR64 [RDI]
LOAD_YMM3 = b"\xc5\xfc\x10\x1f"  # VMOVUPS YMM3, [RDI]
STORE_YMM3 = b"\xc5\xfc\x11\x1f"  # VMOVUPS [RDI], YMM3
OUT_80 = code.out8(0x80)

# Bits of XCR0.
X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2

#: Bytes of the FXSAVE image that an FXRSTOR of it gives back: without the reserved ones.
_IMAGE = 160 + 256


def _image(seed: int) -> bytes:
    """An FXSAVE image: all x87 registers in use and every byte of the XMM registers its own."""
    head = struct.pack("<HHBBHQQII", 0x37F, 0, 0xFF, 0, 0x111, 0, 0, 0x1F80, 0xFFFF)
    x87 = b"".join(struct.pack("<QH6x", 1 << 63 | seed << 8 | n, 0x3FFF + n) for n in range(8))
    xmm = bytes((seed + n) & 0xFF for n in range(256))
    return (head + x87 + xmm).ljust(512, b"\0")


def _comparable(image: bytes) -> tuple[int, bytes, bytes]:
    """FCW, the x87 registers and the XMM registers of an image."""
    return int.from_bytes(image[:2], "little"), image[32:160], image[160:_IMAGE]


@pytest.mark.parametrize("intercepted", [False, True], ids=["L2-handles", "L1-intercepts"])
def test_device_not_available(l1: L1, intercepted: bool) -> None:
    """#NM depends on CR0's real TS, EM and MP and never on the mask and the read shadow."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0] & ~(Cr0.TS | Cr0.EM | Cr0.MP)
    bitmap = 1 << Vector.NM if intercepted else 0
    for ts, em, mp in itertools.product((0, Cr0.TS), (0, Cr0.EM), (0, Cr0.MP)):
        faults = {
            **{FNINIT: ts or em, WAIT: ts and mp},
            **{EMMS: None if em else ts, MOVAPS: None if em else ts},
        }
        for mask, shadow in ((0, 0), (Cr0.TS, Cr0.TS ^ ts)):
            for instruction, fault in faults.items():
                seen = guest.run(
                    instruction,
                    GUEST_CR0=cr0 | ts | em | mp,
                    CR0_GUEST_HOST_MASK=mask,
                    CR0_READ_SHADOW=shadow,
                    EXCEPTION_BITMAP=bitmap,
                )
                expected: Outcome = Succeed()
                if fault is None:
                    expected = Fault(Vector.UD, error_code=0, rip=0)
                elif fault and intercepted:
                    expected = guest.exception(Vector.NM)
                elif fault:
                    expected = Fault(Vector.NM, error_code=0, rip=0)
                text = f"{instruction.hex()} CR0 {cr0 | ts | em | mp:#x} mask {mask:#x}"
                assert seen == expected, text


def test_ts_that_l2_sets_and_clears(l1: L1) -> None:
    """L2's own TS works as without VMX: set by MOV CR0, cleared by CLTS, kept over an exit."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0]
    seen = guest.run(code.mov_to_cr(0), {"rax": cr0 | Cr0.TS})
    assert seen == Succeed()
    assert guest.vmcs.read(Field.GUEST_CR0) == (cr0 | Cr0.TS,)
    # L1 has its own TS.
    assert l1.call(MOVAPS) == Succeed()
    seen = guest.run(code.NOP + MOVAPS)
    assert seen == Fault(Vector.NM, error_code=0, rip=1)
    assert guest.run(code.CLTS + MOVAPS) == Succeed()
    assert guest.vmcs.read(Field.GUEST_CR0) == (cr0 & ~Cr0.TS,)
    assert guest.run(MOVAPS) == Succeed()


def test_ts_of_l1_does_not_reach_l2(l1: L1) -> None:
    """TS of L1 and L2 are apart in both directions: CR0 is loaded by entry and exit."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0]
    guest.vmcs[Field.HOST_CR0] = host = guest.vmcs[Field.HOST_CR0] | Cr0.TS
    assert l1.write_cr(0, host) == Succeed()
    assert l1.call(MOVAPS) == Fault(Vector.NM, error_code=0, rip=0)
    assert guest.run(MOVAPS + FNINIT) == Succeed()
    # After the exit TS is the host-state area's.
    assert l1.read_cr(0) == Succeed(host)
    assert l1.call(FNINIT) == Fault(Vector.NM, error_code=0, rip=0)
    assert guest.run(MOVAPS) == Succeed()
    guest.vmcs[Field.HOST_CR0] = host & ~Cr0.TS
    guest.vmcs[Field.GUEST_CR0] = cr0 | Cr0.TS
    assert guest.run(MOVAPS) == Fault(Vector.NM, error_code=0, rip=0)
    assert l1.call(MOVAPS) == Succeed()


@pytest.mark.sdm("Exception Bitmap")
def test_lazy_switch_by_l1(l1: L1) -> None:
    """A hypervisor that hides TS: #NM goes to L1, which clears TS, and L2 never knows."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0] & ~Cr0.TS
    data = l1.sym("l2_data")
    l1.write(data, bytes(range(16)) + bytes(16))
    program = code.mov_from_cr(0, "rbx") + LOAD_XMM0 + code.mov_from_cr(0, "rcx")
    fields = {
        "GUEST_CR0": cr0 | Cr0.TS,
        "CR0_GUEST_HOST_MASK": int(Cr0.TS),
        "CR0_READ_SHADOW": 0,
        "EXCEPTION_BITMAP": 1 << Vector.NM,
    }
    seen = guest.run(program, {"rdi": data}, **fields)
    assert seen == guest.exception(Vector.NM, offset=3)
    assert seen.regs["rbx"] == cr0 & ~Cr0.TS & 0xF | seen.regs["rbx"] & ~0xF
    guest.vmcs[Field.GUEST_CR0] = cr0
    seen = guest.go_on({"rdi": data})
    assert seen == Succeed()
    assert not seen.regs["rcx"] & Cr0.TS
    # L1 finds what L2 loaded.
    assert l1.call(STORE_XMM0, regs={"rdi": data + 16}) == Succeed()
    assert l1.read(data + 16, 16) == bytes(range(16))
    # L2 sets TS, which L1 owns: an exit; CLTS with the shadow 0 is nothing.
    guest.vmcs[Field.EXCEPTION_BITMAP] = 0
    seen = guest.run(code.CLTS + code.mov_to_cr(0), {"rax": cr0 | Cr0.TS})
    assert seen == guest.exit(ExitReason.CR_ACCESS, 3, offset=2)
    # L1 gives it the TS it wants to see, and #NM is then L2's.
    seen = guest.run(
        code.mov_from_cr(0, "rbx") + LOAD_XMM0,
        {"rdi": data},
        GUEST_CR0=cr0 | Cr0.TS,
        CR0_READ_SHADOW=Cr0.TS,
    )
    assert seen == Fault(Vector.NM, error_code=0, rip=3)
    assert seen.regs["rbx"] & Cr0.TS


# --- the registers themselves ---


@pytest.mark.series(15)
@pytest.mark.sdm("Saving and Loading Non-Register State")
def test_fpu_registers_both_ways(l1: L1) -> None:
    """x87 and SSE registers are not switched by VMX: L2 has L1's, and L1 what L2 left."""
    guest = Guest(l1)
    first, second, saved = l1.alloc(), l1.alloc(), l1.alloc()
    l1.write(first, _image(0x10))
    l1.write(second, _image(0x80))
    for _ in range(3):
        assert l1.call(FXRSTOR, regs={"rdi": first}) == Succeed()
        seen = guest.run(
            FXSAVE + b"\x48\x89\xf7" + FXRSTOR,  # MOV RDI, RSI
            {"rdi": saved, "rsi": second},
        )
        assert seen == Succeed()
        assert _comparable(l1.read(saved, 512)) == _comparable(_image(0x10))
        assert l1.call(FXSAVE, regs={"rdi": saved}) == Succeed()
        assert _comparable(l1.read(saved, 512)) == _comparable(_image(0x80))


@pytest.mark.series(15)
@pytest.mark.sdm("Saving and Loading Non-Register State")
def test_fpu_registers_over_userspace(l1: L1) -> None:
    """Userspace sees and changes L2's FPU registers while L2 is in the middle of an OUT."""
    guest = Guest(l1)
    data = l1.sym("l2_data")
    l1.write(data, b"\x5c" * 16)
    seen = guest.run(LOAD_XMM0 + OUT_80 + STORE_XMM0, {"rdi": data, "rax": 1})
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\x01"))
    fpu = l1.vcpu.get_fpu()
    assert bytes(fpu.xmm[0]) == b"\x5c" * 16
    fpu.xmm[0] = bytes(range(0x40, 0x50))
    l1.vcpu.set_fpu(fpu)
    assert guest.resume() == Succeed()
    assert l1.read(data, 16) == bytes(range(0x40, 0x50))


def _enable_xsave(l1: L1, guest: Guest, xcr0: int) -> int:
    """CR4.OSXSAVE for L1 and L2, and XCR0; L2's CR4."""
    host = guest.vmcs[Field.HOST_CR4] | Cr4.OSXSAVE
    assert l1.write_cr(4, host) == Succeed()
    guest.vmcs[Field.HOST_CR4] = host
    assert l1.xsetbv(xcr0) == Succeed()
    return guest.vmcs[Field.GUEST_CR4] | Cr4.OSXSAVE


@pytest.mark.needs(Cr4.OSXSAVE)
@pytest.mark.series(15)
@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
def test_xcr0_is_shared(l1: L1) -> None:
    """XCR0 is not switched: L2 reads L1's; its XSETBV exits and L1 does it."""
    guest = Guest(l1)
    cr4 = _enable_xsave(l1, guest, X87)
    seen = guest.run(code.XGETBV, {"rcx": 0}, GUEST_CR4=cr4)
    assert seen == Succeed()
    assert (seen.regs["rdx"], seen.regs["rax"]) == (0, X87)
    seen = guest.run(code.XSETBV + code.XGETBV, {"rcx": 0, "rax": X87 | SSE, "rdx": 0})
    assert seen == guest.exit(ExitReason.XSETBV, 3)
    assert l1.xgetbv() == Succeed(X87)
    assert l1.xsetbv(X87 | SSE) == Succeed()
    seen = guest.go_on(skip=3)
    assert seen == Succeed()
    assert (seen.regs["rdx"], seen.regs["rax"]) == (0, X87 | SSE)
    # Without CR4.OSXSAVE in L2 the instructions do not exist for it.
    cr4 &= ~Cr4.OSXSAVE
    assert guest.run(code.XGETBV, {"rcx": 0}, GUEST_CR4=cr4) == Fault(Vector.UD, 0, rip=0)
    # L1 keeps its own CR4.OSXSAVE.
    assert l1.xgetbv() == Succeed(X87 | SSE)


@pytest.mark.needs(Cr4.OSXSAVE)
@pytest.mark.series(15)
@pytest.mark.sdm("Saving and Loading Non-Register State")
def test_ymm_registers_both_ways(l1: L1) -> None:
    """The upper halves of the YMM registers survive entries, exits and trips to userspace."""
    guest = Guest(l1)
    outcome = l1.cpuid(0xD)
    assert isinstance(outcome, Succeed)
    if not outcome.value[0] & AVX:
        pytest.skip("needs XCR0.AVX: CPUID.(EAX=0DH,ECX=0H):EAX allows only 0")
    cr4 = _enable_xsave(l1, guest, X87 | SSE | AVX)
    data = l1.sym("l2_data")
    mine, theirs = bytes(range(32)), bytes(range(0x80, 0xA0))
    l1.write(data, mine + theirs + bytes(64))
    assert l1.call(LOAD_YMM3, regs={"rdi": data}) == Succeed()
    program = OUT_80 + STORE_YMM3 + b"\x48\x89\xf7" + LOAD_YMM3 + OUT_80
    seen = guest.run(program, {"rdi": data + 64, "rsi": data + 32, "rax": 0}, GUEST_CR4=cr4)
    for _ in range(2):
        assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
        seen = guest.resume()
    assert seen == Succeed()
    assert l1.read(data + 64, 32) == mine
    assert l1.call(STORE_YMM3, regs={"rdi": data + 96}) == Succeed()
    assert l1.read(data + 96, 32) == theirs


@pytest.mark.needs(Cr4.OSXSAVE)
@pytest.mark.series(18)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
@pytest.mark.parametrize("kept", [True, False], ids=["set", "clear"])
def test_cpuid_follows_the_cr4_of_l1(l1: L1, kept: bool) -> None:
    """CPUID.01H:ECX.OSXSAVE mirrors CR4.OSXSAVE: behind an exit that of L1, whatever L2 had."""
    guest = Guest(l1)
    cr4 = _enable_xsave(l1, guest, X87)
    osxsave = 1 << 27
    outcome = l1.cpuid(1)
    assert isinstance(outcome, Succeed)
    assert outcome.value[2] & osxsave
    guest.vmcs[Field.HOST_CR4] = cr4 if kept else guest.vmcs[Field.HOST_CR4] & ~Cr4.OSXSAVE
    theirs = cr4 & ~Cr4.OSXSAVE if kept else cr4
    for _ in range(2):
        assert guest.run(code.NOP, GUEST_CR4=theirs) == Succeed()
        outcome = l1.cpuid(1)
        assert isinstance(outcome, Succeed)
        assert outcome.value[2] & osxsave == osxsave * kept
