"""L1 on the bare CPU: capabilities, resets, hangs, shutdown, what needs a host, Bochs' end."""

import os
import signal
import time
from pathlib import Path

import pytest

from kvmnest.errors import HarnessError, NeedsHost
from kvmnest.kvm import Cap
from kvmnest.kvm.cpuid import leaf
from kvmnest.l1 import L1, VmLost, code
from kvmnest.l1.pool import L1Pool
from kvmnest.lab.errors import LabSetupError
from kvmnest.reference import emulator
from kvmnest.reference.kvm import ReferenceKvm
from kvmnest.vmx import Cr4, ExitReason, Field, Msr
from kvmnest.vmx.outcome import Exit, Succeed, VMfailInvalid


def test_l2_runs_and_exits(bare):
    with L1(bare) as l1:
        l1.launchable(l2=code.CPUID)
        assert l1.vmlaunch() == Exit(ExitReason.CPUID, qualification=0, length=2)


def test_what_the_cpu_has_is_asked_of_the_cpu(bare):
    msrs = bare.feature_msrs(bare.msr_feature_index_list())
    vendor = leaf(bare.supported_cpuid(), 0)
    with L1(bare) as l1:
        assert {msr: l1.rdmsr(msr).value for msr in msrs} == msrs
        assert l1.cpuid(0).value == (vendor.eax, vendor.ebx, vendor.ecx, vendor.edx)
        assert msrs[Msr.IA32_VMX_CR4_FIXED1] & Cr4.VMXE


def test_reset_undoes_everything(bare):
    pool = L1Pool(bare)
    l1 = pool.take()
    pat = l1.rdmsr(Msr.PAT).value
    vmcs = l1.launchable(l2=code.CPUID)
    vmcs[Field.GUEST_RFLAGS] = 0
    l1.vmlaunch()
    assert l1.wrmsr(Msr.PAT, 0) == Succeed()
    l1.write(l1.alloc(), b"\xff" * 4096)
    pool.give_back(l1)
    assert pool.take() is l1
    assert l1.rdmsr(Msr.PAT) == Succeed(pat)
    assert l1.read(l1.alloc(), 4096) == bytes(4096)
    assert l1.vmxon(l1.prepare_region(l1.sym("vmxon_region"))) == Succeed()
    assert l1.vmlaunch() == VMfailInvalid()
    pool.give_back(l1)
    pool.close()


def test_code_that_python_changes_is_executed_as_it_is(bare):
    with L1(bare) as l1:
        for value in range(1, 40):
            seen = l1.call(b"\xb8" + value.to_bytes(4, "little"))  # MOV EAX, value
            assert seen.regs["rax"] == value


def test_hang_and_triple_fault_are_those_of_kvm(bare):
    for what, kind in ((b"\xeb\xfe", "hang"), (b"\x0f\x01\x1f\xcc", "triple fault")):
        with L1(bare, budget=0.3) as l1:
            l1.write(l1.sym("l2_data"), bytes(16))
            with pytest.raises(VmLost) as caught:
                l1.call(what, regs={"rdi": l1.sym("l2_data")})  # JMP to itself; LIDT, INT3
            assert caught.value.kind == kind
            assert caught.value.registers["rip"] >= l1.sym("snippet_code")
            assert caught.value.registers["cr3"] == l1.sym("l1_pml4")
    with L1(bare) as l1:  # another CPU, or the same one reset
        assert l1.call(code.NOP) == Succeed()


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda l1: l1.call(b"\xe6\x80"), "KVM_EXIT_IO of OUT to port 0x80"),
        (lambda l1: l1.call(b"\xe4\x61"), "KVM_EXIT_IO of IN from port 0x61"),
        (lambda l1: l1.vcpu.get_nested_state(), "KVM_GET_NESTED_STATE"),
        (lambda l1: l1.vcpu.nmi(), "KVM_NMI"),
        (lambda l1: l1.vm.add_memory(1, 0x10000000, l1.memory), "memory slots"),
        (lambda l1: l1.enable_cap(Cap.X86_DISABLE_EXITS), "KVM_CAP_X86_DISABLE_EXITS"),
        (lambda l1: l1.add_cpu(), "a second vCPU"),
        (lambda l1: l1.vm.stats(), "KVM_GET_STATS_FD"),
    ],
)
def test_what_needs_a_host_is_named(bare, use, what):
    with L1(bare) as l1:
        assert l1.call(code.NOP) == Succeed()
        with pytest.raises(NeedsHost, match=f"needs a host: {what}$"):
            use(l1)


def test_bochs_that_is_killed_is_replaced(bare):
    with L1(bare) as l1:
        assert l1.call(code.NOP) == Succeed()
        os.kill(l1.memory.cpu.pid, signal.SIGKILL)
        with pytest.raises(HarnessError, match="the reference CPU ended: killed by SIGKILL"):
            l1.call(code.NOP)
    with L1(bare) as l1:
        assert l1.call(code.NOP) == Succeed()


def test_nothing_stays_behind(built):
    with ReferenceKvm() as kvm, L1(kvm) as l1:
        pid, folder = l1.memory.cpu.pid, l1.memory.cpu.folder
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_bochs_of_our_own(own_cache):
    with pytest.raises(LabSetupError, match="needs its own Bochs: kvmnest lab build"):
        emulator.find()


def test_bochs_that_cannot_be_driven(built, tmp_path):
    other = tmp_path / "bochs"
    other.write_bytes(Path(built).read_bytes().replace(b"KVMNEST_CONTROL", b"KVMNEST_NOTHING"))
    other.chmod(0o755)
    with pytest.raises(LabSetupError, match="does not let other processes drive its CPU"):
        emulator.find(str(other))


def test_no_room_for_its_files(built, monkeypatch):
    def full(name, flags):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.raises(LabSetupError, match=r"[Nn]o space left"), L1(ReferenceKvm()):
        pass


def test_a_case_costs_little(bare):
    pool = L1Pool(bare)
    began = time.monotonic()
    for _ in range(50):
        l1 = pool.take()
        l1.launchable(l2=code.CPUID)
        assert l1.vmlaunch() == Exit(ExitReason.CPUID)
        pool.give_back(l1)
    pool.close()
    # Without Linux a fresh L1 costs next to nothing: 0.7 ms here, 15 ms are a defect.
    assert time.monotonic() - began < 10
