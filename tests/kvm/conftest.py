"""Fixtures for tests on this machine's real /dev/kvm; without one they are skipped."""

from collections.abc import Iterator

import pytest
from kvm_guest import Guest

from kvmnest.kvm import Kvm, KvmUnavailable, Vm


@pytest.fixture(scope="session")
def kvm() -> Iterator[Kvm]:
    try:
        system = Kvm()
    except KvmUnavailable as error:
        pytest.skip(str(error))
    with system:
        yield system


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as machine:
        yield machine


@pytest.fixture
def guest(vm: Vm) -> Guest:
    return Guest(vm)
