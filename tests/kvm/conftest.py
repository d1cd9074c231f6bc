"""Fixtures for tests on this machine's real /dev/kvm; without one they are skipped."""

import signal
from collections.abc import Iterator

import pytest
from kvm_guest import Guest

from kvmnest.kvm import Kvm, KvmUnavailable, Vm

DEADLINE = 30


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """End a test that hangs in the guest: the signal takes the main thread out of KVM_RUN."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"no end within {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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
