"""VMs: memory slots, dirty log, interrupt controllers, clock, closing."""

import errno
import os
import threading

import pytest
from kvm_guest import CODE, HLT, NOP, SPIN, Guest

from kvmnest.kvm import Cap, Kvm, KvmError, Memory, Vm
from kvmnest.kvm.exits import IO_OUT, HltExit, IntrExit, IoExit, MmioExit
from kvmnest.kvm.vm import irqchip_route, msi_route

PAGE = 4096
# Store AL at the start of pages 5 and 9, with DS 0: mov %al, 0x5000; mov %al, 0x9000.
TOUCH = b"\xa2\x00\x50\xa2\x00\x90"


def need(vm: Vm, cap: Cap) -> int:
    value = vm.check_extension(cap)
    if not value:
        pytest.skip(f"KVM lacks KVM_CAP_{cap.name}")
    return value


def pages_of(bitmap: bytes) -> set[int]:
    """Pages in the bitmap, but for the code's: KVM may map it writable when it is fetched."""
    pages = {i for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1}
    return pages - {CODE // PAGE}


def test_memory_outlives_its_vm(kvm: Kvm) -> None:
    memory = Memory(0x10000)
    for value in (b"\x11", b"\x22"):
        with kvm.create_vm() as vm:
            vm.add_memory(0, 0, memory)
            guest = Guest(vm, memory=memory)
            guest.load(b"\xa2\x00\x50" + HLT, rax=value[0])
            assert guest.vcpu.run() == HltExit()
        assert memory.read(0x5000, 1) == value


def test_memory_is_kept_alive_by_its_vm(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        guest = Guest(vm)
        guest.load(b"\xa0\x00\x50\xe6\x10" + HLT)
        guest.memory.write(0x5000, b"\x77")
        vcpu = guest.vcpu
        del guest
        assert vcpu.run() == IoExit(IO_OUT, 1, 0x10, 1, b"\x77")


def test_part_of_a_memory(vm: Vm) -> None:
    memory = Memory(0x10000)
    vm.add_memory(0, 0, memory)
    vm.add_memory(1, 0x20000, memory, offset=0x5000, size=PAGE)
    memory.write(0x5000, b"\x66")
    guest = Guest(vm, memory=memory)
    # mov al, [0]; out al; mov al, [0x1000] with DS at 0x2000
    guest.load(b"\xb8\x00\x20\x8e\xd8\xa0\x00\x00\xe6\x10\xa0\x00\x10" + HLT)
    assert guest.vcpu.run() == IoExit(IO_OUT, 1, 0x10, 1, b"\x66")
    assert guest.vcpu.run() == MmioExit(0x21000, 1, False, b"")


def test_removed_memory_is_mmio(vm: Vm) -> None:
    memory, second = Memory(0x10000), Memory(PAGE)
    vm.add_memory(0, 0, memory)
    vm.add_memory(1, 0x20000, second)
    guest = Guest(vm, memory=memory)
    code = b"\xb8\x00\x20\x8e\xd8\xa2\x00\x00\xe6\x10\xa2\x00\x00" + HLT
    guest.load(code)
    assert isinstance(guest.vcpu.run(), IoExit)
    vm.remove_memory(1)
    assert guest.vcpu.run() == MmioExit(0x20000, 1, True, b"\x00")
    with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION on vm .* EINVAL"):
        vm.remove_memory(1)
    vm.add_memory(0, 0, None)
    with pytest.raises(KvmError, match="has no memory slot 0"):
        vm.dirty_log(0)


@pytest.mark.parametrize(
    ("slot", "gpa", "error"),
    [
        (1 << 15, 0x20000, errno.EINVAL),  # slot numbers end below it
        (0xFFFFFFFF, 0x20000, errno.EINVAL),
        (1, 0x20800, errno.EINVAL),  # not aligned
        (1, 0x8000, errno.EEXIST),  # overlaps slot 0
    ],
)
def test_slots_that_kvm_refuses(vm: Vm, slot: int, gpa: int, error: int) -> None:
    vm.add_memory(0, 0, Memory(0x10000))
    with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION") as caught:
        vm.add_memory(slot, gpa, Memory(PAGE))
    assert caught.value.errno == error
    assert caught.value.hint


@pytest.mark.parametrize(("offset", "size"), [(0, 0x20000), (0x10000, PAGE), (-PAGE, None)])
def test_ranges_outside_the_memory(vm: Vm, offset: int, size: int | None) -> None:
    with pytest.raises(IndexError, match="is outside memory of 0x10000"):
        vm.add_memory(0, 0, Memory(0x10000), offset=offset, size=size)


def test_closed_memory_cannot_be_mapped(vm: Vm) -> None:
    memory = Memory(PAGE)
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        vm.add_memory(0, 0, memory)


def test_dirty_log(vm: Vm) -> None:
    memory = Memory(0x14000)
    vm.add_memory(0, 0, memory, log_dirty=True)
    guest = Guest(vm, memory=memory)
    guest.load(TOUCH + HLT)
    vm.dirty_log(0)
    assert guest.vcpu.run() == HltExit()
    bitmap = vm.dirty_log(0)
    assert len(bitmap) == 3  # 20 pages
    assert pages_of(bitmap) == {5, 9}
    assert pages_of(vm.dirty_log(0)) == set()


def test_dirty_log_can_be_switched(vm: Vm) -> None:
    memory = Memory(0x10000)
    vm.add_memory(0, 0, memory)
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG .*with log_dirty=True"):
        vm.dirty_log(0)
    vm.add_memory(0, 0, memory, log_dirty=True)
    guest = Guest(vm, memory=memory)
    guest.load(TOUCH + HLT)
    vm.dirty_log(0)
    guest.vcpu.run()
    assert pages_of(vm.dirty_log(0)) == {5, 9}
    with pytest.raises(KvmError, match=r"vm \d+ has no memory slot 3"):
        vm.dirty_log(3)


def test_clear_dirty_log(vm: Vm) -> None:
    if not need(vm, Cap.MANUAL_DIRTY_LOG_PROTECT2) & 1:
        pytest.skip("no manual protection")
    memory = Memory(0x100000)
    vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1)
    vm.add_memory(0, 0, memory, log_dirty=True)
    guest = Guest(vm, memory=memory)
    guest.load(TOUCH + HLT)
    vm.clear_dirty_log(0, b"\xff" * 32, 0, 256)
    guest.vcpu.run()
    assert pages_of(vm.dirty_log(0)) == {5, 9}
    # Reading does not clear now; clearing is per page.
    vm.clear_dirty_log(0, b"\x20", 0, 64)
    assert pages_of(vm.dirty_log(0)) == {9}
    with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG .*multiples of 64"):
        vm.clear_dirty_log(0, b"\x20", 0, 8)
    with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG .*with log_dirty=True"):
        vm.clear_dirty_log(3, b"\x20", 0, 64)


def test_irqchip_state(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_IRQCHIP .*create_irqchip\(\) comes first"):
        vm.get_irqchip(0)
    vm.create_irqchip()
    with pytest.raises(KvmError, match=r"KVM_CREATE_IRQCHIP .*EEXIST"):
        vm.create_irqchip()
    pic = vm.get_irqchip(0)
    pic.chip.pic.irq_base = 0x30
    vm.set_irqchip(pic)
    assert vm.get_irqchip(0).chip.pic.irq_base == 0x30
    ioapic = vm.get_irqchip(2)
    assert ioapic.chip.ioapic.base_address == 0xFEC00000
    ioapic.chip.ioapic.redirtbl[5] = 0x10033
    vm.set_irqchip(ioapic)
    assert vm.get_irqchip(2).chip.ioapic.redirtbl[5] == 0x10033


def test_pit_state(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_pit2(1)  # with a dummy speaker port
    state = vm.get_pit2()
    state.channels[0].mode = 3
    vm.set_pit2(state)
    assert vm.get_pit2().channels[0].mode == 3


def with_apic_and_handler(vm: Vm, vector: int) -> Guest:
    """A guest that waits with interrupts on and has a handler, on a machine with APICs."""
    guest = Guest(vm)
    guest.memory.write(0x2000, b"\xe6\x77\xcf")
    guest.memory.write(vector * 4, b"\x00\x20\x00\x00")
    guest.load(b"\xfb" + NOP + SPIN)
    lapic = guest.vcpu.get_lapic()
    lapic.regs[0xF0:0xF4] = b"\xff\x01\x00\x00"  # spurious vector 255, APIC enabled
    guest.vcpu.set_lapic(lapic)
    return guest


HANDLED = IoExit(IO_OUT, 1, 0x77, 1, b"\0")


def test_signal_msi(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_SIGNAL_MSI .*no in-kernel irqchip"):
        vm.signal_msi(0xFEE00000, 0x41)
    vm.create_irqchip()
    guest = with_apic_and_handler(vm, 0x41)
    assert vm.signal_msi(0xFEE00000, 0x41) == 1
    assert guest.vcpu.run() == HANDLED


def test_gsi_routing_to_an_msi(vm: Vm) -> None:
    vm.create_irqchip()
    guest = with_apic_and_handler(vm, 0x42)
    vm.set_gsi_routing([msi_route(40, 0xFEE00000, 0x42)])
    vm.irq_line(40, 1)
    assert guest.vcpu.run() == HANDLED


def test_irq_line_through_the_ioapic(vm: Vm) -> None:
    vm.create_irqchip()
    guest = with_apic_and_handler(vm, 0x43)
    ioapic = vm.get_irqchip(2)
    ioapic.chip.ioapic.redirtbl[7] = 0x43  # edge, fixed, physical, APIC 0
    vm.set_irqchip(ioapic)
    vm.set_gsi_routing([irqchip_route(33, 2, 7)])
    vm.irq_line(33, 1)
    assert guest.vcpu.run() == HANDLED
    with pytest.raises(KvmError, match=r"KVM_SET_GSI_ROUTING on vm .* EINVAL"):
        vm.set_gsi_routing([irqchip_route(33, 9, 7)])


def test_clock(vm: Vm) -> None:
    clock = vm.get_clock()
    clock.clock += 10**15
    clock.flags = 0
    vm.set_clock(clock)
    assert 0 <= vm.get_clock().clock - clock.clock < 10**10


def test_addresses_for_real_mode(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFFFBC000)
    try:
        vm.set_tss_addr(0xFFFBD000)
    except KvmError as error:
        text = str(error)
        assert "KVM_SET_TSS_ADDR on vm" in text
        assert "only kvm_intel implements it" in text
    vm.create_vcpu()
    with pytest.raises(KvmError, match=r"KVM_SET_IDENTITY_MAP_ADDR .*before the first vCPU"):
        vm.set_identity_map_addr(0xFFFBC000)


def test_capabilities(vm: Vm) -> None:
    assert vm.check_extension(Cap.NR_MEMSLOTS) > 30
    assert vm.check_extension(9999) == 0
    with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP on vm \d+ failed: EINVAL"):
        vm.enable_cap(9999)


def test_disable_exits(vm: Vm) -> None:
    hlt = 2
    if not need(vm, Cap.X86_DISABLE_EXITS) & hlt:
        pytest.skip("HLT exits cannot be disabled")
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
        vm.enable_cap(Cap.X86_DISABLE_EXITS, 1 << 60)
    vm.enable_cap(Cap.X86_DISABLE_EXITS, hlt)
    guest = Guest(vm)
    guest.load_long(HLT + b"\xeb\xfd")  # and again, if the host's interrupt ends the halt
    # The processor halts in the guest: no exit but the kick's.
    timer = threading.Timer(0.1, guest.vcpu.kick)
    timer.start()
    outcome = guest.vcpu.run()
    timer.join()
    if outcome == HltExit():
        pytest.skip("this KVM emulates the guest, HLT included")
    assert outcome == IntrExit()


def test_vcpu_ids(vm: Vm) -> None:
    vm.create_vcpu(0)
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU on vm \d+ failed: EEXIST"):
        vm.create_vcpu(0)
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU .*EINVAL.*MAX_VCPU_ID"):
        vm.create_vcpu(1 << 30)
    assert vm.create_vcpu(5).id == 5
    assert [vcpu.name for vcpu in vm.vcpus] == ["vcpu 0", "vcpu 5"]


def test_vm_stats(guest: Guest) -> None:
    need(guest.vm, Cap.BINARY_STATS_FD)
    stats = guest.vm.stats()
    assert "remote_tlb_flush" in stats
    assert guest.vm.stats().keys() == stats.keys()


def test_unknown_machine_type(kvm: Kvm) -> None:
    with pytest.raises(
        KvmError, match=r"KVM_CREATE_VM on /dev/kvm failed: EINVAL .*no such VM type"
    ):
        kvm.create_vm(0x7777)


def resources() -> tuple[int, int]:
    with open("/proc/self/maps") as maps:
        mapped = sum("kvm-vcpu" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped


def test_closing_gives_everything_back(kvm: Kvm) -> None:
    before = resources()
    for _ in range(3):
        with kvm.create_vm() as vm:
            guests = Guest(vm), Guest(vm, vcpu_id=1, memory=Memory(PAGE))
            for guest in guests:
                guest.vcpu.stats()
            vm.stats()
            guests[0].load(HLT)
            guests[0].vcpu.run()
            assert resources() > before
        assert resources() == before


def test_a_kept_view_of_kvm_run_stays_readable(kvm: Kvm) -> None:
    before = resources()
    with kvm.create_vm() as vm:
        guest = Guest(vm)
        guest.load(HLT)
        guest.vcpu.run()
        run = guest.vcpu.kvm_run
    assert run.exit_reason == 5
    del run
    assert resources() == before


def test_forgotten_objects_are_closed(kvm: Kvm) -> None:
    import gc

    before = resources()
    vm = kvm.create_vm()
    Guest(vm).vcpu.stats()
    del vm
    gc.collect()
    assert resources() == before
