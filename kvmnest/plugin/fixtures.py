"""Fixtures: ``kvm`` for the session, ``vm`` and ``l1`` fresh for each case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kvmnest.cases.offer import HostOffer

if TYPE_CHECKING:
    from kvmnest.kvm import Kvm, Vm
    from kvmnest.l1 import L1
    from kvmnest.l1.pool import L1Pool

OFFER = pytest.StashKey[HostOffer]()


def offer(config: pytest.Config) -> HostOffer:
    """What this session's KVM offers, asked once."""
    if OFFER not in config.stash:
        config.stash[OFFER] = _made(config)
    return config.stash[OFFER]


def _made(config: pytest.Config) -> HostOffer:
    if config.getoption("--kvmnest-target") != "reference":
        return HostOffer()
    from kvmnest.reference.offer import ReferenceOffer

    option = config.getoption
    return ReferenceOffer(option("--kvmnest-bochs"), option("--kvmnest-cpu-model"))


def open_kvm(config: pytest.Config) -> Kvm:
    """Open /dev/kvm; without one skip, or with --require-kvm raise KvmUnavailable."""
    from kvmnest.kvm import KvmUnavailable

    try:
        return offer(config).kvm
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


@pytest.fixture(scope="session")
def l1_pool(kvm: Kvm, pytestconfig: pytest.Config) -> Iterator[L1Pool]:
    """Where the cases' L1s come from; ``--fresh-vm`` makes a new VM for each case."""
    from kvmnest.l1.pool import L1Pool

    pool = L1Pool(
        kvm,
        budget=pytestconfig.getoption("--kvmnest-budget"),
        nested_roundtrip=pytestconfig.getoption("--nested-roundtrip"),
    )
    yield pool
    pool.close()


@pytest.fixture
def l1(
    l1_pool: L1Pool, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> Iterator[L1]:
    """An L1 (``kvmnest.l1.L1``) as new: in its command loop, outside VMX operation.

    After a case that passed, its VM is reset for the next one; after any other it is thrown away.
    """
    failed = request.session.testsfailed
    new = l1_pool.take()
    stream = pytestconfig.pluginmanager.get_plugin("kvmnest-events")
    if stream is not None and pytestconfig.getoption("--kvmnest-trace"):
        from kvmnest.cases.trace import Recorder

        new.on_results = Recorder(new, stream.trace)
    try:
        yield new
    finally:
        new.on_results = None
        fresh = pytestconfig.getoption("--fresh-vm")
        l1_pool.give_back(new, reuse=not fresh and request.session.testsfailed == failed)
