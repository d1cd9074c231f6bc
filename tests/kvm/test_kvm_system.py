"""/dev/kvm itself."""

import errno
from pathlib import Path

import pytest

from kvmnest.kvm import Cap, Kvm, KvmMsrError
from kvmnest.kvm.caps import Cap as CapOfModule
from kvmnest.kvm.native import ffi


def test_version_and_extensions(kvm: Kvm) -> None:
    assert kvm.api_version == 12
    assert kvm.check_extension(Cap.USER_MEMORY) == 1
    assert kvm.check_extension(Cap.IMMEDIATE_EXIT) == 1
    assert kvm.check_extension(9999) == 0
    assert kvm.vcpu_mmap_size >= ffi.sizeof("struct kvm_run")
    assert kvm.vcpu_mmap_size % 4096 == 0


def test_msr_index_lists(kvm: Kvm) -> None:
    indices = kvm.msr_index_list()
    assert 0x10 in indices  # IA32_TIME_STAMP_COUNTER
    assert len(indices) == len(set(indices)) > 10
    features = kvm.msr_feature_index_list()
    assert len(features) == len(set(features)) > 0


def test_feature_msrs(kvm: Kvm) -> None:
    indices = kvm.msr_feature_index_list()
    values = kvm.feature_msrs(indices)
    assert list(values) == indices
    with pytest.raises(KvmMsrError, match=r"KVM_GET_MSRS on /dev/kvm .*MSR 0x12345") as caught:
        kvm.feature_msrs([*indices, 0x12345])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.done == len(indices)


def test_supported_cpuid(kvm: Kvm) -> None:
    cpuid = kvm.supported_cpuid()
    leaves = {e.function: e for e in cpuid.entries[0 : cpuid.nent]}
    assert 0 < cpuid.nent <= 256
    assert leaves[0].eax >= 1
    assert leaves[1].ecx >> 31 & 1 or leaves[1].edx  # a hypervisor bit or features
    assert kvm.emulated_cpuid().nent >= 1


def test_more_cpuid_entries_than_expected(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kvm.supported_cpuid().nent
    monkeypatch.setattr("kvmnest.kvm.base.CPUID_ENTRIES", (whole + 3) // 4)
    assert kvm.supported_cpuid().nent == whole


def test_names_of_the_package() -> None:
    import kvmnest.kvm as package

    assert package.Cap is CapOfModule
    assert package.HltExit.__name__ == "HltExit"
    with pytest.raises(AttributeError, match=r"module 'kvmnest.kvm' has no attribute 'Nonsense'"):
        package.Nonsense  # noqa: B018
    # Every name that mypy sees is there at run time.
    text = Path(package.__file__).read_text()
    for line in text.split("TYPE_CHECKING:")[1].split("\n_HOMES")[0].splitlines():
        if " as " in line:
            assert hasattr(package, line.split(" as ")[1])


def test_repr(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    assert repr(vm) == f"<Vm {vm.name}>"
    vm.close()
    assert repr(vm) == f"<Vm {vm.name} closed>"
