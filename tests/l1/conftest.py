"""Fixtures for tests of L1 on this machine's real /dev/kvm, with or without VT-x."""

from collections.abc import Iterator

import pytest

from kvmnest.kvm import Kvm, KvmUnavailable
from kvmnest.l1 import L1


@pytest.fixture(scope="session")
def kvm() -> Iterator[Kvm]:
    try:
        system = Kvm()
    except KvmUnavailable as error:
        pytest.skip(str(error))
    with system:
        yield system


@pytest.fixture
def l1(kvm: Kvm) -> Iterator[L1]:
    with L1(kvm, budget=10) as machine:
        yield machine
