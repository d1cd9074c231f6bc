"""Taking a vCPU out of the guest from another thread, without losing or inventing a kick."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from kvm_guest import HLT, SPIN, Guest

from kvmnest.kvm import KvmError, Memory, Vcpu, Vm
from kvmnest.kvm.exits import Exit, HltExit, IntrExit, IoExit
from kvmnest.kvm.kick import kick_signal

OUT_LOOP = b"\xe6\x10\xeb\xfc"  # out %al, $0x10; jmp back


@contextmanager
def running(target: Callable[[], None]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive(), "the vCPU's thread did not end"


def test_kick_ends_an_endless_loop(guest: Guest) -> None:
    guest.load(SPIN)
    timer = threading.Timer(0.1, guest.vcpu.kick)
    timer.start()
    started = time.monotonic()
    assert guest.vcpu.run() == IntrExit()
    assert 0.05 < time.monotonic() - started < 5
    timer.join()


def test_gil_is_free_while_the_guest_runs(guest: Guest) -> None:
    guest.load(SPIN)
    counted = 0

    def count() -> None:
        nonlocal counted
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            counted += 1
        guest.vcpu.kick()

    with running(count):
        assert guest.vcpu.run() == IntrExit()
    # Alone in the interpreter, or nearly so; a held GIL would have let it count nothing.
    assert counted > 1000


def test_a_kick_before_the_run_is_kept_and_used_once(guest: Guest) -> None:
    guest.load(b"\xe6\x10" + HLT)
    guest.vcpu.kick()
    guest.vcpu.kick()
    assert guest.vcpu.run() == IntrExit()
    assert isinstance(guest.vcpu.run(), IoExit)
    assert guest.vcpu.run() == HltExit()


def test_a_kick_can_be_taken_back(guest: Guest) -> None:
    guest.load(HLT)
    guest.vcpu.kick()
    guest.vcpu.clear_kick()
    assert guest.vcpu.run() == HltExit()


@pytest.mark.parametrize("code", [SPIN, OUT_LOOP], ids=["in the guest", "in and out"])
def test_each_kick_is_seen_exactly_once(guest: Guest, code: bytes) -> None:
    kicks = 300
    seen = threading.Semaphore(0)
    count = 0
    stop = False

    def run() -> None:
        nonlocal count
        while not stop:
            if guest.vcpu.run() == IntrExit():
                count += 1
                seen.release()

    guest.load(code)
    rng = random.Random(1)
    with running(run):
        for done in range(kicks):
            # From "before the entry" to "well inside".
            time.sleep(rng.choice((0, 1e-6, 1e-5, 1e-4, 1e-3)) * rng.random())
            guest.vcpu.kick()
            assert seen.acquire(timeout=5), f"kick {done} was lost"
            assert count == done + 1, f"kick {done} was seen twice"
        stop = True
        guest.vcpu.kick()
    # The last one may find the thread between two runs, on its way out.
    assert count - kicks in (0, 1)


def test_a_slow_kicker_does_not_kick_twice(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    # The vCPU sees immediate_exit long before the signal is sent: the signal must not end a
    # later run.
    def slow() -> int:
        time.sleep(0.02)
        return kick_signal()

    def kick() -> None:
        time.sleep(0.01)  # now the vCPU's thread is inside, most of the time
        guest.vcpu.kick()

    monkeypatch.setattr("kvmnest.kvm.vcpu.kick_signal", slow)
    guest.load(OUT_LOOP)
    for _ in range(5):
        with running(kick):
            while isinstance(guest.vcpu.run(), IoExit):
                pass
            end = time.monotonic() + 0.04
            while time.monotonic() < end:
                assert isinstance(guest.vcpu.run(), IoExit)


def test_a_signal_handler_may_kick(guest: Guest) -> None:
    # It runs in the thread that runs the vCPU, at any point of run() and clear_kick().
    count = 0

    def handler(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        guest.vcpu.kick()

    guest.load(SPIN)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        main = threading.main_thread().ident or 0
        stop = threading.Event()

        def fire() -> None:
            # Slower than the handler, which nests otherwise. Again and again: Python runs no
            # handler for a signal that comes right before the system call.
            while not stop.wait(5e-3):
                signal.pthread_kill(main, signal.SIGUSR1)

        with running(fire):
            try:
                while count < 100:
                    assert guest.vcpu.run() == IntrExit()
            finally:
                stop.set()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_kick_reaches_only_its_vcpu(vm: Vm) -> None:
    memory = Memory(0x10000)
    vm.add_memory(0, 0, memory)
    guests = [Guest(vm, vcpu_id=i, memory=memory) for i in range(2)]
    ended: list[int] = []
    for guest in guests:
        guest.load(SPIN)
    threads = [
        threading.Thread(target=lambda i=i: (guests[i].vcpu.run(), ended.append(i)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    guests[1].vcpu.kick()
    threads[1].join(5)
    time.sleep(0.05)
    assert ended == [1]
    guests[0].vcpu.kick()
    threads[0].join(5)
    assert ended == [1, 0]


def test_two_vcpus_run_at_once_and_share_memory(vm: Vm) -> None:
    memory = Memory(0x10000)
    vm.add_memory(0, 0, memory)
    # Each sets its byte and waits for the other's: neither ends alone.
    first = b"\xc6\x06\x00\x20\x01\x80\x3e\x01\x20\x01\x75\xf9" + HLT
    second = b"\x80\x3e\x00\x20\x01\x75\xf9\xc6\x06\x01\x20\x01" + HLT
    results: dict[int, Exit] = {}

    def run(vcpu: Vcpu) -> None:
        results[vcpu.id] = vcpu.run()

    guests = [Guest(vm, vcpu_id=i, memory=memory) for i in range(2)]
    guests[0].load(first, at=0x1000)
    guests[1].load(second, at=0x1100)
    with running(lambda: run(guests[0].vcpu)), running(lambda: run(guests[1].vcpu)):
        pass
    assert results == {0: HltExit(), 1: HltExit()}
    assert memory.read(0x2000, 2) == b"\1\1"


def test_close_while_running(guest: Guest) -> None:
    guest.load(SPIN)
    outcome: list[object] = []

    def run() -> None:
        outcome.append(guest.vcpu.run())
        try:
            guest.vcpu.run()
        except KvmError as error:
            outcome.append(error)

    with running(run):
        time.sleep(0.05)
        guest.vcpu.close()
    assert outcome[0] == IntrExit()
    assert "vcpu 0 is closed" in str(outcome[1])
    guest.vcpu.kick()  # of no effect, no error


def test_another_signal_ends_the_run_and_its_handler_runs(guest: Guest) -> None:
    class Interrupted(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    guest.load(SPIN)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(
            0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        )
        timer.start()
        with pytest.raises(Interrupted):
            guest.vcpu.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    # The vCPU is as usable as before.
    guest.vcpu.kick()
    assert guest.vcpu.run() == IntrExit()


def test_signal_mask_of_the_vcpu(guest: Guest) -> None:
    # SIGUSR1 is blocked in the guest only: it has to wait for the kick.
    arrived: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: arrived.append(time.monotonic()))
    try:
        guest.load(SPIN)
        guest.vcpu.set_signal_mask({signal.SIGUSR1})
        main = threading.main_thread().ident or 0
        signals = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGUSR1))
        kicks = threading.Timer(0.3, guest.vcpu.kick)
        signals.start()
        kicks.start()
        started = time.monotonic()
        assert guest.vcpu.run() == IntrExit()
        assert time.monotonic() - started > 0.2
        assert len(arrived) == 1
        guest.vcpu.set_signal_mask(None)
    finally:
        signal.signal(signal.SIGUSR1, before)


def child(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


CAUGHT = "[l for l in open('/proc/self/status') if l.startswith('SigCgt')]"


def test_importing_installs_no_handler() -> None:
    code = f"a = {CAUGHT}; import kvmnest.kvm.system; b = {CAUGHT}; print(a == b)"
    assert child(code) == "True"


def test_a_signal_in_use_is_left_alone() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGRTMAX, lambda *_: None)\n"
        "from kvmnest.kvm.kick import kick_signal\n"
        "print(signal.SIGRTMAX - kick_signal(), kick_signal() == kick_signal())"
    )
    assert child(code) == "1 True"


def test_no_signal_left() -> None:
    code = (
        "import signal\n"
        "for n in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):\n"
        "    signal.signal(n, signal.SIG_IGN)\n"
        "from kvmnest.errors import HarnessError\n"
        "from kvmnest.kvm.kick import kick_signal\n"
        "try:\n"
        "    kick_signal()\n"
        "except HarnessError as error:\n"
        "    print(error)\n"
    )
    assert child(code) == "no real-time signal is free to kick a vCPU with"


def test_a_waiting_processor_is_kicked_and_started(kvm_with_irqchip: Vm) -> None:
    vm = kvm_with_irqchip
    boot = Guest(vm)
    memory = boot.memory
    application = vm.create_vcpu(1)
    # Map the local APIC's page 1:1 and let the boot processor send INIT, then SIPI 2.
    boot.load_long(
        b"\xb8\x00\x03\xe0\xfe"  # mov $0xfee00300, %eax
        b"\xc7\x00\x00\x45\x0c\x00"  # movl $0xc4500, (%rax): INIT to all others
        b"\xc7\x00\x02\x46\x0c\x00"  # movl $0xc4602, (%rax): SIPI, page 2
        b"\xe6\x10"
    )
    memory.write(0x11018, (0x13003).to_bytes(8, "little"))
    memory.write(0x13FB8, (0xFEE00083).to_bytes(8, "little"))
    memory.write(0x2000, b"\xe6\x11")
    lapic = boot.vcpu.get_lapic()
    lapic.regs[0xF0:0xF4] = b"\xff\x01\x00\x00"  # spurious vector 255, APIC enabled
    boot.vcpu.set_lapic(lapic)
    assert application.get_mp_state() == 1  # waits for INIT and SIPI
    outcome: list[Exit] = []
    with running(lambda: outcome.append(application.run())):
        time.sleep(0.05)
        assert outcome == []
        application.kick()
    assert outcome == [IntrExit()]
    with running(lambda: outcome.append(application.run())):
        time.sleep(0.05)
        assert isinstance(boot.vcpu.run(), IoExit)
    value = outcome[1]
    assert isinstance(value, IoExit)
    assert value.port == 0x11


def test_halt_inside_the_kernel_is_kicked(kvm_with_irqchip: Vm) -> None:
    guest = Guest(kvm_with_irqchip)
    guest.load(HLT + SPIN)
    threading.Timer(0.1, guest.vcpu.kick).start()
    assert guest.vcpu.run() == IntrExit()
    assert guest.vcpu.get_mp_state() == 3  # halted


@pytest.fixture
def kvm_with_irqchip(vm: Vm) -> Vm:
    vm.create_irqchip()
    return vm
