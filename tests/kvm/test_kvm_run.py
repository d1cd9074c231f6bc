"""KVM_RUN: every exit that a guest can be made to cause here, and the answers to them."""

import errno

import pytest
from kvm_guest import HLT, NOP, SPIN, Guest

from kvmnest.kvm import Cap, KvmError, Memory, Vm
from kvmnest.kvm.exits import (
    IO_IN,
    IO_OUT,
    MSR_REASON_FILTER,
    MSR_REASON_UNKNOWN,
    DebugExit,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    IrqWindowOpenExit,
    MemoryFaultExit,
    MmioExit,
    RdmsrExit,
    ShutdownExit,
    WrmsrExit,
)

DEBUG_ENABLE, DEBUG_SINGLESTEP = 1, 2
DEBUG_SW_BREAKPOINT, DEBUG_HW_BREAKPOINT = 0x10000, 0x20000
RDMSR_WRMSR = b"\x0f\x32\x0f\x30"
# A handler that says on port 0x77 that it ran, and returns.
HANDLER = b"\xe6\x77\xcf"
HANDLED = 0x77
LOW_MEMORY = 0xF0000


def install_handler(guest: Guest, vector: int) -> None:
    guest.memory.write(0x2000, HANDLER)
    guest.memory.write(vector * 4, b"\x00\x20\x00\x00")


@pytest.mark.parametrize(
    ("code", "size"), [(b"\xe6\x10", 1), (b"\xe7\x10", 2), (b"\x66\xe7\x10", 4)]
)
def test_out(guest: Guest, code: bytes, size: int) -> None:
    guest.load(code + HLT, rax=0x44332211)
    data = b"\x11\x22\x33\x44"[:size]
    assert guest.vcpu.run() == IoExit(IO_OUT, size, 0x10, 1, data)
    assert guest.vcpu.run() == HltExit()


@pytest.mark.parametrize(
    ("code", "size"), [(b"\xe4\x10", 1), (b"\xe5\x10", 2), (b"\x66\xe5\x10", 4)]
)
def test_in(guest: Guest, code: bytes, size: int) -> None:
    guest.load(code + HLT, rax=0)
    assert guest.vcpu.run() == IoExit(IO_IN, size, 0x10, 1, b"")
    answer = b"\x99\x88\x77\x66"[:size]
    guest.vcpu.set_io_data(answer)
    assert guest.vcpu.run() == HltExit()
    assert guest.vcpu.get_regs().rax == int.from_bytes(answer, "little")


def test_a_run_to_a_port_is_silent_about_that_exit_only(guest: Guest) -> None:
    # out %al, $0x10; out %al, $0x11; out %ax, $0x10; in $0x10, %al; out %al, $0x10
    guest.load(b"\xe6\x10\xe6\x11\xe7\x10\xe4\x10\xe6\x10" + HLT, rax=0x4241)
    run = guest.vcpu.run_to_port
    assert run(0x10) is None
    assert run(0x10) == IoExit(IO_OUT, 1, 0x11, 1, b"\x41")
    assert run(0x10) == IoExit(IO_OUT, 2, 0x10, 1, b"\x41\x42")
    assert run(0x10) == IoExit(IO_IN, 1, 0x10, 1, b"")
    guest.vcpu.set_io_data(b"\x43")
    assert run(0x10) is None
    assert run(0x10) == HltExit()
    guest.vcpu.kick()
    assert run(0x10) == IntrExit()


def test_string_out(guest: Guest) -> None:
    # rep outsw: KVM may deliver it in any number of pieces.
    guest.memory.write(0x3000, b"abcdefgh")
    guest.load(b"\xf3\x6f" + HLT, rcx=4, rsi=0x3000, rdx=0x80)
    seen = b""
    while isinstance(value := guest.vcpu.run(), IoExit):
        assert (value.direction, value.size, value.port) == (IO_OUT, 2, 0x80)
        assert len(value.data) == value.count * 2
        seen += value.data
    assert value == HltExit()
    assert seen == b"abcdefgh"


def test_string_in_has_a_count(guest: Guest) -> None:
    guest.load(b"\xf3\x6d" + HLT, rcx=3, rdi=0x3000, rdx=0x80)
    assert guest.vcpu.run() == IoExit(IO_IN, 2, 0x80, 3, b"")
    guest.vcpu.set_io_data(b"uvwxyz")
    assert guest.vcpu.run() == HltExit()
    assert guest.memory.read(0x3000, 6) == b"uvwxyz"


def test_io_answers_are_checked(guest: Guest) -> None:
    guest.load(b"\xe6\x10\xe5\x11" + HLT)
    guest.vcpu.run()
    with pytest.raises(ValueError, match="vcpu 0 is not at an IN"):
        guest.vcpu.set_io_data(b"x")
    guest.vcpu.run()
    with pytest.raises(ValueError, match="IN takes 2 bytes, not 1"):
        guest.vcpu.set_io_data(b"x")
    with pytest.raises(ValueError, match="not at an MMIO read"):
        guest.vcpu.set_mmio_data(b"x")
    with pytest.raises(ValueError, match="not at an MSR access"):
        guest.vcpu.set_msr_result(1)
    with pytest.raises(ValueError, match="not at a hypercall"):
        guest.vcpu.set_hypercall_result(1)


def test_immediate_exit_completes_and_does_not_enter(guest: Guest) -> None:
    guest.load(b"\xe4\x10" + b"\xb0\x01" + HLT)
    guest.vcpu.run()
    guest.vcpu.set_io_data(b"\x55")
    assert guest.vcpu.run(immediate_exit=True) == IntrExit()
    # IN is complete, MOV AL, 1 has not run.
    assert guest.vcpu.get_regs().rax == 0x55
    assert guest.vcpu.run() == HltExit()
    assert guest.vcpu.get_regs().rax == 1


def test_mmio(vm: Vm) -> None:
    memory = Memory(LOW_MEMORY)
    vm.add_memory(0, 0, memory)
    guest = Guest(vm, memory=memory)
    # mov ax, [0x1234]; mov [0x1236], ax; mov [0x1238], al with DS at 0xf000.
    code = b"\xb8\x00\xf0\x8e\xd8\xa1\x34\x12\xa3\x36\x12\xa2\x38\x12"
    guest.load(code + HLT)
    assert guest.vcpu.run() == MmioExit(0xF1234, 2, False, b"")
    with pytest.raises(ValueError, match="the read takes 2 bytes, not 4"):
        guest.vcpu.set_mmio_data(b"\1\2\3\4")
    guest.vcpu.set_mmio_data(b"\xef\xbe")
    assert guest.vcpu.run() == MmioExit(0xF1236, 2, True, b"\xef\xbe")
    with pytest.raises(ValueError, match="not at an MMIO read"):
        guest.vcpu.set_mmio_data(b"\1\2")
    assert guest.vcpu.run() == MmioExit(0xF1238, 1, True, b"\xef")
    assert guest.vcpu.run() == HltExit()


def test_read_only_memory_exits_on_write_only(vm: Vm) -> None:
    memory, rom = Memory(0x10000), Memory(0x1000)
    vm.add_memory(0, 0, memory)
    vm.add_memory(1, 0x10000, rom, read_only=True)
    rom.write(0, b"\x5a")
    guest = Guest(vm, memory=memory)
    # mov al, [0]; mov [1], al with DS at 0x1000.
    guest.load(b"\xb8\x00\x10\x8e\xd8\xa0\x00\x00\xa2\x01\x00" + HLT)
    assert guest.vcpu.run() == MmioExit(0x10001, 1, True, b"\x5a")
    assert guest.vcpu.run() == HltExit()
    assert rom.read(0, 2) == b"\x5a\x00"


def test_triple_fault(guest: Guest) -> None:
    guest.load_long(b"\x0f\x0b")  # UD2 without an IDT
    assert guest.vcpu.run() == ShutdownExit()


def test_internal_error(guest: Guest) -> None:
    # jmp to an address without memory: KVM cannot fetch what it would have to emulate.
    guest.load_long(b"\xb8\x00\x00\x10\x00\xff\xe0")
    value = guest.vcpu.run()
    assert isinstance(value, InternalErrorExit)
    assert value.suberror == 1
    assert value.text == "emulation failed"
    assert guest.vcpu.get_regs().rip == 0x100000


def test_long_mode(guest: Guest) -> None:
    # movabs $0x1122334455667788, %rax; out %al, $0x10
    guest.load_long(b"\x48\xb8\x88\x77\x66\x55\x44\x33\x22\x11\xe6\x10" + HLT)
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, 0x10, 1, b"\x88")
    assert guest.vcpu.run() == HltExit()
    assert guest.vcpu.get_regs().rax == 0x1122334455667788


def test_single_step(guest: Guest) -> None:
    guest.load(NOP * 3 + HLT)
    guest.vcpu.set_guest_debug(DEBUG_ENABLE | DEBUG_SINGLESTEP)
    places = []
    while not places or places[-1] < 0x1002:
        value = guest.vcpu.run()
        assert isinstance(value, DebugExit)
        assert value.exception == 1
        assert value.dr6 & 1 << 14  # BS: single step
        places.append(value.pc)
    # kvm_intel on Bochs stops once more, before the first instruction.
    assert places in ([0x1001, 0x1002], [0x1000, 0x1001, 0x1002])
    guest.vcpu.set_guest_debug(0)
    assert guest.vcpu.run() == HltExit()


def test_hardware_breakpoint(guest: Guest) -> None:
    guest.load(NOP * 3 + HLT)
    registers = [0x1002, 0, 0, 0, 0, 0, 0, 0x402]
    guest.vcpu.set_guest_debug(DEBUG_ENABLE | DEBUG_HW_BREAKPOINT, registers)
    value = guest.vcpu.run()
    assert isinstance(value, DebugExit)
    assert (value.exception, value.pc, value.dr6 & 0xF) == (1, 0x1002, 1)


def test_software_breakpoint(guest: Guest) -> None:
    guest.load_long(NOP + b"\xcc" + HLT)
    guest.vcpu.set_guest_debug(DEBUG_ENABLE | DEBUG_SW_BREAKPOINT)
    value = guest.vcpu.run()
    if isinstance(value, InternalErrorExit) and value.instruction.startswith(b"\xcc"):
        pytest.skip("this KVM emulates the guest and cannot emulate INT3")
    assert isinstance(value, DebugExit)
    assert (value.exception, value.pc) == (3, 0x1001)


def test_interrupt_window_and_injection(guest: Guest) -> None:
    install_handler(guest, 0x40)
    guest.load(b"\xfa" + NOP + b"\xfb" + NOP + SPIN)  # cli; nop; sti; nop; spin
    guest.vcpu.kvm_run.request_interrupt_window = 1
    assert guest.vcpu.run() == IrqWindowOpenExit()
    assert guest.vcpu.kvm_run.if_flag
    guest.vcpu.kvm_run.request_interrupt_window = 0
    guest.vcpu.interrupt(0x40)
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, HANDLED, 1, b"\0")


def test_nmi(guest: Guest) -> None:
    install_handler(guest, 2)
    guest.load(SPIN)
    guest.vcpu.nmi()
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, HANDLED, 1, b"\0")
    assert guest.vcpu.get_vcpu_events().nmi.masked


def need(vm: Vm, cap: Cap) -> None:
    if not vm.check_extension(cap):
        pytest.skip(f"KVM lacks KVM_CAP_{cap.name}")


def test_msr_exits(guest: Guest) -> None:
    need(guest.vm, Cap.X86_USER_SPACE_MSR)
    guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, MSR_REASON_UNKNOWN)
    guest.load(RDMSR_WRMSR + HLT, rcx=0x1234)
    assert guest.vcpu.run() == RdmsrExit(MSR_REASON_UNKNOWN, 0x1234)
    guest.vcpu.set_msr_result(0x1122334455667788)
    assert guest.vcpu.run() == WrmsrExit(MSR_REASON_UNKNOWN, 0x1234, 0x1122334455667788)
    guest.vcpu.set_msr_result()
    assert guest.vcpu.run() == HltExit()


def test_msr_exit_answered_with_a_fault(guest: Guest) -> None:
    need(guest.vm, Cap.X86_USER_SPACE_MSR)
    install_handler(guest, 13)
    guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, MSR_REASON_UNKNOWN)
    guest.load(RDMSR_WRMSR + HLT, rcx=0x1234)
    assert isinstance(guest.vcpu.run(), RdmsrExit)
    guest.vcpu.set_msr_result(error=True)
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, HANDLED, 1, b"\0")


def test_msr_filter(guest: Guest) -> None:
    need(guest.vm, Cap.X86_MSR_FILTER)
    tsc_aux, star = 0xC0000103, 0xC0000081
    guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, MSR_REASON_FILTER)
    # Of 0xc0000080 to 0xc0000087 reading all but STAR is allowed.
    guest.vm.set_msr_filter([(1, 0xC0000080, 8, b"\xfd")])
    guest.load(RDMSR_WRMSR + HLT, rcx=star)
    assert guest.vcpu.run() == RdmsrExit(MSR_REASON_FILTER, star)
    guest.vm.set_msr_filter([])
    guest.load(b"\x0f\x32" + HLT, rcx=star)
    assert guest.vcpu.run() == HltExit()
    with pytest.raises(ValueError, match="9 MSRs need 2 bytes"):
        guest.vm.set_msr_filter([(1, tsc_aux, 9, b"\xff")])


def test_failure_of_run_names_the_vcpu(guest: Guest) -> None:
    guest.load(SPIN)
    guest.vcpu.kvm_run.kvm_valid_regs = 1 << 40  # no such set of registers
    with pytest.raises(KvmError, match="KVM_RUN on vcpu 0 failed: EINVAL") as caught:
        guest.vcpu.run()
    assert caught.value.errno == errno.EINVAL


def test_memory_that_is_gone(guest: Guest) -> None:
    # The process gave the pages back: three generations of KVM say it in three ways.
    guest.load(SPIN)
    guest.memory.close()
    outcome: object
    try:
        outcome = guest.vcpu.run()
    except KvmError as error:
        outcome = error.errno
    assert outcome == errno.EFAULT or isinstance(outcome, MemoryFaultExit | InternalErrorExit)


def test_sync_regs(guest: Guest) -> None:
    # kvm_run carries the registers out and in, without ioctls of their own.
    need(guest.vm, Cap.SYNC_REGS)
    guest.load(b"\xe6\x10" + b"\xe6\x11" + HLT, rax=0x42)
    run = guest.vcpu.kvm_run
    run.kvm_valid_regs = 1
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, 0x10, 1, b"\x42")
    assert run.s.regs.regs.rax == 0x42
    run.s.regs.regs.rax = 0x43
    run.kvm_dirty_regs = 1
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, 0x11, 1, b"\x43")
