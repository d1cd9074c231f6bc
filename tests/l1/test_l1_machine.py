"""L1 on this machine's KVM: the command loop, traps, modes, time budget, reset, round trip.

What needs VT-x is covered by the suite in the lab.
"""

import signal

import pytest

from kvmnest.errors import HarnessError
from kvmnest.kvm import Kvm
from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1, Mode, Shadow, VmLost, code
from kvmnest.l1.command import Command, Frame, Kind
from kvmnest.l1.pool import L1Pool
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault, HostExit, Succeed
from kvmnest.vmx.registers import STATUS_FLAGS

REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rbp", *(f"r{n}" for n in range(8, 16)))


def test_registers_both_ways(l1: L1) -> None:
    before = {name: 0x0123456789ABCDEF + i for i, name in enumerate(REGISTERS)}
    seen = l1.execute("nop", before)
    assert seen == Succeed()
    assert {name: seen.regs[name] for name in REGISTERS} == before


def test_rflags_of_the_instruction(l1: L1) -> None:
    assert l1.call(b"\x31\xc0").rflags & STATUS_FLAGS == 0x44  # XOR EAX, EAX: ZF and PF
    assert l1.call(b"\xf9", rflags=0x2).rflags & STATUS_FLAGS == 0x1  # STC


def test_control_registers(l1: L1) -> None:
    cr0 = l1.read_cr(0).value
    assert cr0 & 0x80010021 == 0x80010021
    assert l1.write_cr(0, cr0 ^ 0x2) == Succeed()
    assert l1.read_cr(0) == Succeed(cr0 ^ 0x2)


def test_msrs(l1: L1) -> None:
    assert l1.rdmsr(0xC0000080).value & 0xD00 == 0xD00
    assert l1.wrmsr(0xC0000102, 0x1234567890) == Succeed()
    assert l1.rdmsr(0xC0000102) == Succeed(0x1234567890)


def test_fault_with_error_code_and_cr2(l1: L1) -> None:
    load = b"\x48\x8b\x07"  # MOV RAX, [RDI]
    seen = l1.call(code.NOP + load, at=0x40000123)
    assert seen == Fault(Vector.PF, error_code=0, cr2=0x40000123, rip=1)
    assert l1.call(load, at=0x8000000000000000) == Fault(Vector.GP, error_code=0, rip=0)
    assert l1.call(code.UD2) == Fault(Vector.UD, error_code=0, rip=0)
    # A fault leaves the loop intact.
    assert l1.execute("nop", {}) == Succeed()


def test_cpl_3(l1: L1) -> None:
    assert l1.execute("nop", {}, cpl=3) == Succeed()
    assert l1.execute("rdmsr", {"rcx": 0x10}, cpl=3) == Fault(Vector.GP, error_code=0, rip=0)


def test_compatibility_mode(l1: L1) -> None:
    """VMXOFF outside VMX operation is #UD everywhere; the frame of the trap tells the mode."""
    assert l1.vmxoff(mode=Mode.COMPAT, cpl=3) == Fault(Vector.UD, error_code=0, rip=0)
    results = l1.cpu.submit([l1.command("vmxoff", {}, mode=Mode.COMPAT, cpl=3)])
    assert isinstance(results, list)
    assert results[0].cs == l1.sym("SEL_USER_CODE32")


@pytest.mark.parametrize("shadow", Shadow)
def test_blocking(l1: L1, shadow: Shadow) -> None:
    assert l1.execute("nop", {}, shadow=shadow) == Succeed()


def test_io_reaches_python_and_goes_on(l1: L1) -> None:
    seen = l1.outb(0x10, 0x5A)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, IoExit)
    assert (seen.exit.port, seen.exit.data) == (0x10, b"\x5a")
    with pytest.raises(HarnessError, match="out8 is suspended"):
        l1.read_cr(0)
    assert l1.resume() == Succeed()
    assert l1.read_cr(3) == Succeed(l1.sym("l1_pml4"))


def test_in_gets_its_data(l1: L1) -> None:
    assert isinstance(l1.inb(0x10), HostExit)
    l1.vcpu.set_io_data(b"\x77")
    assert l1.resume().regs["rax"] & 0xFF == 0x77


def test_hang_is_named(kvm: Kvm) -> None:
    with L1(kvm, budget=0.3) as l1, pytest.raises(VmLost, match="hang in code ebfe") as caught:
        l1.call(code.JMP_SELF)
    assert caught.value.kind == "hang"
    assert caught.value.registers["rip"] == l1.sym("snippet_code")


def test_triple_fault_is_named(l1: L1) -> None:
    l1.write(l1.sym("l1_idt"), bytes(4096))
    with pytest.raises(VmLost, match="triple fault in code 0f0b") as caught:
        l1.call(code.UD2)
    assert caught.value.kind == "triple fault"
    assert not l1.resettable


def test_log_names_the_commands(l1: L1) -> None:
    l1.rdmsr(0xC0000080)
    l1.call(code.UD2)
    texts = [str(command) for command, _ in l1.log]
    assert texts[0].startswith("rdmsr ")
    assert "rcx=0xc0000080" in texts[0]
    assert texts[1].startswith("code 0f0b")


def test_alloc(l1: L1) -> None:
    first, second = l1.alloc(), l1.alloc(2)
    assert second == first + 4096
    assert l1.read(first, 4096) == bytes(4096)
    with pytest.raises(HarnessError, match="used up"):
        l1.alloc(2000)


@pytest.mark.parametrize("op", [0, 4, 5, 0xFFFFFFFF])
def test_an_unknown_operation_says_so_and_does_nothing(l1: L1, op: int) -> None:
    """Also in a batch: the commands around it run."""
    nop = l1.command("nop", {})
    unknown = Command(Frame(Kind.PLAIN, "unknown", op, 0x1234), {})
    results = l1.cpu.submit([nop, unknown, nop])
    assert isinstance(results, list)
    trap, bad = l1.sym("STATUS_TRAP"), l1.sym("STATUS_BAD_OP")
    assert [result.status for result in results] == [trap, bad, trap]


def test_too_long_code(l1: L1) -> None:
    with pytest.raises(HarnessError, match="3000 bytes of code"):
        l1.call(b"\x90" * 3000)


def test_unknown_instruction(l1: L1) -> None:
    with pytest.raises(Exception, match="insn_nosuch"):
        l1.execute("nosuch", {})


def test_reset_undoes_what_commands_did(kvm: Kvm) -> None:
    with L1(kvm) as l1:
        l1.keep_state()
        cr0 = l1.read_cr(0).value
        page = l1.alloc()
        l1.write(page, b"dirty")
        l1.write(0x300000, b"dirty too")
        l1.write(l1.sym("l1_pml4_pt") + 8 * 512, b"\0" * 8)
        assert l1.write_cr(0, cr0 ^ 0x2) == Succeed()
        assert l1.wrmsr(0xC0000102, 0x1234) == Succeed()
        assert l1.write_dr(0, 0x5678) == Succeed()
        l1.reset()
        assert l1.read_cr(0) == Succeed(cr0)
        assert l1.rdmsr(0xC0000102) == Succeed(0)
        assert l1.read_dr(0) == Succeed(0)
        assert l1.alloc() == page
        assert l1.read(page, 5) == bytes(5)
        assert l1.read(0x300000, 9) == bytes(9)
        assert l1.read_int(l1.sym("l1_pml4_pt") + 8 * 512) & 1


def test_reset_after_a_round_trip(kvm: Kvm) -> None:
    """The vCPU is another one then, and gets the same state."""
    with L1(kvm) as l1:
        l1.keep_state()
        assert l1.wrmsr(0xC0000102, 0x1234) == Succeed()
        l1.round_trip()
        assert l1.rdmsr(0xC0000102) == Succeed(0x1234)
        l1.reset()
        assert l1.rdmsr(0xC0000102) == Succeed(0)


def test_what_is_not_looked_at_is_of_its_own_command(l1: L1) -> None:
    """Registers are unpacked when asked for, and later commands use the same slot."""
    first = l1.execute("nop", {"rax": 1})
    second = l1.execute("nop", {"rax": 2, "rbx": 3})
    assert (first.regs["rax"], second.regs["rax"]) == (1, 2)
    assert (first.regs["rbx"], second.regs["rbx"]) == (0, 3)
    inputs = {"rax": 4}
    l1.execute("nop", inputs)
    inputs["rax"] = 5
    assert "rax=0x4" in str(l1.log[-1][0])


def test_the_state_of_one_command_is_not_left_for_the_next(l1: L1) -> None:
    stack = l1.sym("snippet_stack_top") - 64
    push = b"\x9c\x58"  # PUSHFQ; POP RAX
    assert l1.call(push, rflags=0x2, rsp=stack).regs["rax"] & STATUS_FLAGS == 0
    seen = l1.call(push)
    assert seen.regs["rax"] & STATUS_FLAGS == STATUS_FLAGS
    assert seen.regs["rsp"] != stack
    load = b"\x48\x8b\x07"  # MOV RAX, [RDI]
    assert l1.call(load, at=0x40000000) == Fault(Vector.PF, cr2=0x40000000)
    assert l1.call(load) == Succeed()
    assert l1.call(b"\x0f\x20\xd0", regs={"cr2": 0x5678}).regs["rax"] == 0x5678  # MOV RAX, CR2
    assert l1.call(b"\x0f\x20\xd0").regs["rax"] == 0


def test_the_handler_of_sigalrm_comes_back(kvm: Kvm) -> None:
    """A host application's own handler outlives every case."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        ours = signal.getsignal(signal.SIGALRM)
        with L1(kvm, budget=10) as l1:
            assert l1.execute("nop", {}) == Succeed()
            assert signal.getsignal(signal.SIGALRM) is not ours
        assert signal.getsignal(signal.SIGALRM) is ours
    finally:
        signal.signal(signal.SIGALRM, before)


def test_pool_throws_away_what_reset_cannot_undo(kvm: Kvm) -> None:
    pool = L1Pool(kvm)
    first = pool.take()
    assert first.execute("nop", {}) == Succeed()
    pool.give_back(first)
    again = pool.take()
    assert again is first
    assert again.vcpu.get_regs().rip
    assert not again.resettable
    pool.give_back(again)
    assert pool.take() is not first
    pool.close()


def test_state_survives_a_round_trip(kvm: Kvm) -> None:
    with L1(kvm, nested_roundtrip=True) as l1:
        cr0 = l1.read_cr(0).value
        assert l1.write_cr(0, cr0 ^ 0x2) == Succeed()
        assert l1.read_cr(0) == Succeed(cr0 ^ 0x2)
        assert l1.wrmsr(0xC0000102, 0x987654321) == Succeed()
        assert l1.rdmsr(0xC0000102) == Succeed(0x987654321)
        assert l1.write_dr(0, 0x5678) == Succeed()
        assert l1.read_dr(0) == Succeed(0x5678)


def test_round_trip_in_the_middle_of_an_instruction(kvm: Kvm) -> None:
    with L1(kvm, nested_roundtrip=True) as l1:
        seen = l1.outb(0x10, 1)
        assert isinstance(seen, HostExit)
        assert l1.resume() == Succeed()


def test_second_vcpu(l1: L1) -> None:
    second = l1.add_cpu()
    seen = l1.execute("nop", {"rax": 7}, cpu=second)
    assert seen == Succeed()
    assert seen.regs["rax"] == 7
    assert l1.execute("nop", {"rax": 9}).regs["rax"] == 9
    with pytest.raises(HarnessError, match="at most 2"):
        l1.add_cpu()


def test_closing_twice(kvm: Kvm) -> None:
    l1 = L1(kvm)
    l1.close()
    l1.close()
