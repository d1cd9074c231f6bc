"""The state of a vCPU: what is set comes back, what is refused is named."""

import errno
import os

import pytest
from kvm_guest import HLT, Guest

from kvmnest.kvm import Cap, Kvm, KvmError, KvmMsrError, Vm, ioctls
from kvmnest.kvm.exits import HltExit
from kvmnest.kvm.native import CData, ffi

EFER, STAR, LSTAR, TSC, SYSENTER_EIP = 0xC0000080, 0xC0000081, 0xC0000082, 0x10, 0x176
NO_SUCH_MSR = 0x12345


def raw(structure: CData) -> bytes:
    return bytes(ffi.buffer(structure))


def need(vm: Vm, cap: Cap) -> int:
    value = vm.check_extension(cap)
    if not value:
        pytest.skip(f"KVM lacks KVM_CAP_{cap.name}")
    return value


def test_regs(guest: Guest) -> None:
    regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rflags) == (0xFFF0, 2)  # as after reset
    names = [name for name, _ in ffi.typeof(regs).item.fields if name != "rflags"]
    assert len(names) == 17
    for i, name in enumerate(names):
        setattr(regs, name, 0x1000 + i)
    regs.rflags = 0x202
    guest.vcpu.set_regs(regs)
    assert raw(guest.vcpu.get_regs()) == raw(regs)


def test_the_guest_sees_the_registers(guest: Guest) -> None:
    guest.load(b"\x01\xd8" + HLT, rax=2, rbx=3)  # add %bx, %ax
    assert guest.vcpu.run() == HltExit()
    assert guest.vcpu.get_regs().rax == 5


def test_sregs(guest: Guest) -> None:
    sregs = guest.vcpu.get_sregs()
    assert sregs.cs.selector == 0xF000
    sregs.cr2 = 0xDEAD000
    sregs.fs.base, sregs.fs.selector = 0x1230, 0x123
    sregs.gdt.base, sregs.gdt.limit = 0x5000, 0x27
    guest.vcpu.set_sregs(sregs)
    assert raw(guest.vcpu.get_sregs()) == raw(sregs)


def test_inconsistent_sregs_are_explained(guest: Guest) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.cr0 |= 1 << 31  # paging without protection
    with pytest.raises(KvmError, match=r"KVM_SET_SREGS on vcpu 0 failed: EINVAL.*without PE"):
        guest.vcpu.set_sregs(sregs)


def test_sregs2_keeps_the_pdptes(guest: Guest) -> None:
    need(guest.vm, Cap.SREGS2)
    sregs = guest.vcpu.get_sregs2()
    assert sregs.flags == 0
    # 32-bit PAE paging: its four PDPTEs are registers.
    sregs.cr0 |= 1 << 31 | 1
    sregs.cr4 |= 1 << 5
    sregs.cr3 = 0x3000
    sregs.flags = 1
    sregs.pdptrs = [0x5001, 0x6001, 0, 0x7001]
    guest.vcpu.set_sregs2(sregs)
    got = guest.vcpu.get_sregs2()
    if not got.cr0 >> 31:
        pytest.skip("this KVM has no paging outside long mode")
    assert got.flags == 1
    assert list(got.pdptrs) == [0x5001, 0x6001, 0, 0x7001]
    sregs.flags = 2
    with pytest.raises(KvmError, match=r"KVM_SET_SREGS2 .*unknown flags"):
        guest.vcpu.set_sregs2(sregs)


def test_fpu(guest: Guest) -> None:
    fpu = guest.vcpu.get_fpu()
    fpu.fcw = 0x27F
    fpu.xmm[15] = bytes(range(16))
    guest.vcpu.set_fpu(fpu)
    got = guest.vcpu.get_fpu()
    assert (got.fcw, bytes(got.xmm[15])) == (0x27F, bytes(range(16)))


@pytest.mark.parametrize("getter", ["get_xsave", "get_xsave2"])
def test_xsave(guest: Guest, kvm: Kvm, getter: str) -> None:
    size = need(guest.vm, Cap.XSAVE2 if getter == "get_xsave2" else Cap.XSAVE)
    guest.vcpu.set_cpuid(kvm.supported_cpuid())
    area = getattr(guest.vcpu, getter)()
    assert ffi.sizeof(area[0]) == max(size, 4096)
    # XMM0 is at byte 160; XSTATE_BV at 512 has x87 and SSE in use.
    area.region[40] = 0x600DF00D
    area.region[128] |= 3
    guest.vcpu.set_xsave(area)
    assert getattr(guest.vcpu, getter)().region[40] == 0x600DF00D


def test_xsave_with_unknown_state_is_refused(guest: Guest) -> None:
    area = guest.vcpu.get_xsave()
    area.region[129] = 1 << 30  # XSTATE_BV bit 62
    with pytest.raises(KvmError, match=r"KVM_SET_XSAVE .*EINVAL.*XSTATE_BV"):
        guest.vcpu.set_xsave(area)


def test_xsave2_where_kvm_lacks_it(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest.vm, "check_extension", lambda cap: 0)
    with pytest.raises(KvmError, match=r"KVM_GET_XSAVE2 on vcpu 0 .*use get_xsave"):
        guest.vcpu.get_xsave2()


def test_xcrs(guest: Guest, kvm: Kvm) -> None:
    need(guest.vm, Cap.XCRS)
    guest.vcpu.set_cpuid(kvm.supported_cpuid())
    xcrs = guest.vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    xcrs.xcrs[0].value = 3
    guest.vcpu.set_xcrs(xcrs)
    assert guest.vcpu.get_xcrs().xcrs[0].value == 3
    xcrs.xcrs[0].value = 2  # SSE without x87
    with pytest.raises(KvmError, match="KVM_SET_XCRS on vcpu 0 failed: EINVAL"):
        guest.vcpu.set_xcrs(xcrs)


def test_debugregs(guest: Guest) -> None:
    registers = guest.vcpu.get_debugregs()
    assert registers.dr6 & 0xFFFF0FF0 == 0xFFFF0FF0
    registers.db = [1, 2, 3, 4]
    registers.dr7 = 0x455
    guest.vcpu.set_debugregs(registers)
    got = guest.vcpu.get_debugregs()
    assert list(got.db) == [1, 2, 3, 4]
    assert got.dr7 == 0x455
    registers.dr7 = 1 << 32
    with pytest.raises(KvmError, match=r"KVM_SET_DEBUGREGS .*bits above 31"):
        guest.vcpu.set_debugregs(registers)


def test_vcpu_events(guest: Guest) -> None:
    events = guest.vcpu.get_vcpu_events()
    assert not events.nmi.masked
    events.nmi.masked = 1
    events.interrupt.injected, events.interrupt.nr = 1, 0x40
    events.exception.injected, events.exception.nr = 1, 13
    events.exception.has_error_code, events.exception.error_code = 1, 0x18
    guest.vcpu.set_vcpu_events(events)
    got = guest.vcpu.get_vcpu_events()
    assert (got.nmi.masked, got.interrupt.injected, got.interrupt.nr) == (1, 1, 0x40)
    assert (got.exception.injected, got.exception.nr, got.exception.error_code) == (1, 13, 0x18)
    events.exception.nr = 32
    with pytest.raises(KvmError, match=r"KVM_SET_VCPU_EVENTS .*a vector above 31"):
        guest.vcpu.set_vcpu_events(events)


def test_mp_state_and_lapic(vm: Vm) -> None:
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    assert vcpu.get_mp_state() == 0
    vcpu.set_mp_state(3)
    assert vcpu.get_mp_state() == 3
    lapic = vcpu.get_lapic()
    lapic.regs[0xF0] = 0x77  # spurious vector
    vcpu.set_lapic(lapic)
    assert vcpu.get_lapic().regs[0xF0] == 0x77


def test_lapic_without_irqchip(guest: Guest) -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_LAPIC .*no in-kernel irqchip"):
        guest.vcpu.get_lapic()
    with pytest.raises(KvmError, match=r"KVM_SET_MP_STATE .*needs an in-kernel irqchip"):
        guest.vcpu.set_mp_state(3)


def test_msrs(guest: Guest, kvm: Kvm) -> None:
    guest.vcpu.set_cpuid(kvm.supported_cpuid())
    values = {STAR: 0x1B000800000000, LSTAR: 0xFFFF800000001000, SYSENTER_EIP: 0x4000}
    assert guest.vcpu.set_msrs(values) == 3
    assert guest.vcpu.get_msrs(values) == values
    assert list(guest.vcpu.get_msrs([SYSENTER_EIP, STAR])) == [SYSENTER_EIP, STAR]
    assert guest.vcpu.get_msrs([]) == {}
    assert guest.vcpu.set_msrs({}) == 0


def test_more_msrs_than_one_ioctl_takes(guest: Guest) -> None:
    # KVM takes fewer than 256; the refused one is the 601st.
    assert guest.vcpu.get_msrs([STAR] * 600) == {STAR: 0}
    with pytest.raises(
        KvmMsrError, match=r"MSR 0x12345 was refused \(entry 601 of 602\)"
    ) as caught:
        guest.vcpu.get_msrs([STAR] * 600 + [NO_SUCH_MSR, LSTAR])
    assert (caught.value.index, caught.value.done) == (NO_SUCH_MSR, 600)


def test_the_first_refused_msr_is_named(guest: Guest) -> None:
    with pytest.raises(KvmMsrError, match=r"KVM_GET_MSRS on vcpu 0 .*MSR 0x12345 was refused"):
        guest.vcpu.get_msrs([STAR, NO_SUCH_MSR, 0x54321])
    with pytest.raises(KvmMsrError, match=r"KVM_SET_MSRS on vcpu 0 .*MSR 0x12345") as caught:
        guest.vcpu.set_msrs({STAR: 7, NO_SUCH_MSR: 0, LSTAR: 7})
    assert (caught.value.index, caught.value.done) == (NO_SUCH_MSR, 1)
    assert guest.vcpu.get_msrs([STAR, LSTAR]) == {STAR: 7, LSTAR: 0}


def test_cpuid(guest: Guest, kvm: Kvm) -> None:
    assert guest.vcpu.get_cpuid().nent == 0
    cpuid = kvm.supported_cpuid()
    guest.vcpu.set_cpuid(cpuid)
    got = guest.vcpu.get_cpuid()
    ours = {
        (e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in cpuid.entries[0 : cpuid.nent]
    }
    back = {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in got.entries[0 : got.nent]}
    # A KVM may leave out leaves that say nothing, as those of AMX where no guest may use it.
    assert back.keys() == {leaf for leaf in ours if leaf in back or any(ours[leaf])}
    # Leaves without run-time bits come back as they went in; here: vendor and brand.
    for leaf in (0, 0x80000002, 0x80000003):
        assert back[leaf, 0] == ours[leaf, 0]


def test_the_guest_sees_its_cpuid(guest: Guest, kvm: Kvm) -> None:
    cpuid = kvm.supported_cpuid()
    for entry in cpuid.entries[0 : cpuid.nent]:
        if entry.function == 0:
            entry.ebx = 0x600DF00D
    guest.vcpu.set_cpuid(cpuid)
    guest.load(b"\x66\x31\xc0\x0f\xa2" + HLT)  # xor %eax, %eax; cpuid
    assert guest.vcpu.run() == HltExit()
    assert guest.vcpu.get_regs().rbx == 0x600DF00D


def test_nested_state(guest: Guest, kvm: Kvm) -> None:
    guest.vcpu.set_cpuid(kvm.supported_cpuid())
    if not guest.vm.check_extension(Cap.NESTED_STATE):
        with pytest.raises(KvmError, match=r"KVM_GET_NESTED_STATE .*no nested virtualization") as e:
            guest.vcpu.get_nested_state()
        assert e.value.errno == errno.ENOTTY
        return
    # Outside VMX operation (SVM: guest mode) there is a header and nothing else.
    state = guest.vcpu.get_nested_state()
    assert len(state) == 128
    header = ffi.from_buffer("struct kvm_nested_state *", state)
    assert header.size == 128
    guest.vcpu.set_nested_state(state)
    assert guest.vcpu.get_nested_state() == state


def test_nested_state_needs_its_announced_length(guest: Guest) -> None:
    for bad in (b"", bytes(127), bytes(4) + (4096).to_bytes(4, "little") + bytes(120)):
        with pytest.raises(ValueError, match=f"nested state of {len(bad)} bytes"):
            guest.vcpu.set_nested_state(bad)


def test_translate(guest: Guest) -> None:
    guest.load_long(HLT)
    low = guest.vcpu.translate(0x1FF123)
    assert (low.physical_address, low.valid) == (0x1FF123, 1)
    assert not guest.vcpu.translate(0x200000).valid


def test_tsc(guest: Guest) -> None:
    need(guest.vm, Cap.GET_TSC_KHZ)
    khz = guest.vcpu.get_tsc_khz()
    assert 10_000 < khz < 10_000_000
    guest.vcpu.set_tsc_khz(khz)  # the host's own is always possible
    assert guest.vcpu.get_tsc_khz() == khz
    if need(guest.vm, Cap.VM_TSC_CONTROL):
        assert guest.vm.get_tsc_khz() == khz
        guest.vm.set_tsc_khz(khz)


def test_tsc_offset(guest: Guest) -> None:
    need(guest.vm, Cap.VCPU_ATTRIBUTES)
    try:
        before = guest.vcpu.get_tsc_offset()
    except KvmError as error:
        pytest.skip(f"no TSC offset on this kernel: {error}")
    host = guest.vcpu.get_msrs([TSC])[TSC]
    wanted = (before + (1 << 50)) % (1 << 64)
    guest.vcpu.set_tsc_offset(wanted)
    if guest.vcpu.get_tsc_offset() == before:
        pytest.skip("this KVM gives the guest the host's TSC")
    assert guest.vcpu.get_tsc_offset() == wanted
    assert 0 <= guest.vcpu.get_msrs([TSC])[TSC] - host - (1 << 50) < 1 << 40
    guest.vcpu.set_tsc_offset(-1)
    assert guest.vcpu.get_tsc_offset() == (1 << 64) - 1


def test_kvmclock_ctrl_without_kvmclock(guest: Guest) -> None:
    with pytest.raises(KvmError, match=r"KVM_KVMCLOCK_CTRL .*not enabled kvmclock"):
        guest.vcpu.kvmclock_ctrl()


def test_smi(guest: Guest) -> None:
    if guest.vm.check_extension(Cap.X86_SMM):
        guest.vcpu.smi()
        assert guest.vcpu.get_vcpu_events().smi.pending
    else:
        with pytest.raises(KvmError, match="KVM_SMI on vcpu 0 failed: ENOTTY"):
            guest.vcpu.smi()


def test_tpr_access_reporting(vm: Vm) -> None:
    vm.create_irqchip()
    need(vm, Cap.VAPIC)
    vcpu = vm.create_vcpu()
    vcpu.set_tpr_access_reporting(True)
    vcpu.set_tpr_access_reporting(False)


def test_machine_check(guest: Guest, kvm: Kvm) -> None:
    need(guest.vm, Cap.MCE)
    capabilities = kvm.mce_capabilities()
    guest.vcpu.setup_mce(capabilities & ~0xFF | 4)  # four banks
    guest.vcpu.set_mce(1, 1 << 63 | 0x123, addr=0x5000)  # valid, corrected
    status = 0x401 + 4 * 1
    assert guest.vcpu.get_msrs([status, status + 1]) == {
        status: 1 << 63 | 0x123,
        status + 1: 0x5000,
    }
    with pytest.raises(KvmError, match="KVM_X86_SET_MCE on vcpu 0 failed: EINVAL"):
        guest.vcpu.set_mce(7, 1 << 63)


def test_queued_interrupt_and_irqchip(vm: Vm) -> None:
    vm.create_irqchip()
    with pytest.raises(KvmError, match=r"KVM_INTERRUPT .*use irq_line"):
        vm.create_vcpu().interrupt(0x40)


def test_guest_debug_on_an_unknown_bit(guest: Guest) -> None:
    guest.vcpu.set_guest_debug(1)
    guest.vcpu.set_guest_debug(0)
    with pytest.raises((IndexError, OverflowError)):
        guest.vcpu.set_guest_debug(1, range(9))


def test_stats(guest: Guest) -> None:
    need(guest.vm, Cap.BINARY_STATS_FD)
    guest.load(b"\xe6\x10" * 5 + HLT)
    before = guest.vcpu.stats()
    while guest.vcpu.run() != HltExit():
        pass
    after = guest.vcpu.stats()
    assert before["io_exits"] == 0
    assert after["exits"] >= 5  # type: ignore[operator]
    assert isinstance(after["halt_poll_success_hist"], list)
    assert len(after["halt_poll_success_hist"]) > 8
    fd = guest.vcpu.stats_fd()
    assert b"kvm-" in os.pread(fd, 256, 0)
    os.close(fd)


def test_enable_cap_on_a_vcpu(guest: Guest) -> None:
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP on vcpu 0 failed: EINVAL"):
        guest.vcpu.enable_cap(9999)
    assert guest.vcpu.check_extension(Cap.USER_MEMORY) == 1


def test_an_ioctl_of_another_object(guest: Guest) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_IRQCHIP on vcpu 0 failed: (EINVAL|ENOTTY)"):
        guest.vcpu.ioctl(ioctls.CREATE_IRQCHIP)
