"""Fixtures: ``kvm`` for the session, ``vm`` and ``l1`` fresh for each case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kvmnest.plugin.machine import Machine

if TYPE_CHECKING:
    from kvmnest.kvm import Kvm, Vm
    from kvmnest.l1 import L1

MACHINE = pytest.StashKey[Machine]()


def machine(config: pytest.Config) -> Machine:
    """Return the session's machine."""
    if MACHINE not in config.stash:
        config.stash[MACHINE] = Machine()
    return config.stash[MACHINE]


def open_kvm(config: pytest.Config) -> Kvm:
    """Open /dev/kvm; without one skip, or with --require-kvm raise KvmUnavailable."""
    from kvmnest.kvm import KvmUnavailable

    try:
        return machine(config).kvm
    except KvmUnavailable as error:
        if config.getoption("--require-kvm"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kvm(pytestconfig: pytest.Config) -> Kvm:
    """The machine's KVM (``kvmnest.kvm.Kvm``), open for the whole session."""
    return open_kvm(pytestconfig)


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """A new, empty VM (``kvmnest.kvm.Vm``)."""
    with kvm.create_vm() as new:
        yield new


@pytest.fixture
def l1(kvm: Kvm, pytestconfig: pytest.Config) -> Iterator[L1]:
    """A new L1 (``kvmnest.l1.L1``) in its command loop, outside VMX operation."""
    from kvmnest.l1 import L1

    with L1(
        kvm,
        budget=pytestconfig.getoption("--kvmnest-budget"),
        nested_roundtrip=pytestconfig.getoption("--nested-roundtrip"),
    ) as new:
        yield new
