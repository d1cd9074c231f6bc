"""Sending single instructions of L2 to KVM's emulator: the prefix UD2 "kvm"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
PREFIX = b"\x0f\x0bkvm"


@pytest.fixture
def forced(pytestconfig: pytest.Config) -> Iterator[bytes]:
    """The prefix that sends an instruction to KVM's emulator.

    The parameter is switched on for the case if the kernel is ours: not on this machine's own.
    """
    target = pytestconfig.getoption("--kvmnest-target")
    if target == "reference":
        pytest.skip("needs a host: kvm.force_emulation_prefix=1")
    if not PARAMETER.exists():
        pytest.skip("needs kvm.force_emulation_prefix=1: this kernel has no such parameter")
    before = PARAMETER.read_text(encoding="ascii").strip()
    if before in ("0", "N"):
        if target == "kvm":
            pytest.skip(f"needs kvm.force_emulation_prefix=1: it is {before}")
        try:
            PARAMETER.write_text("1", encoding="ascii")
        except OSError as error:
            pytest.skip(f"needs kvm.force_emulation_prefix=1: it is {before}, {error.strerror}")
    yield PREFIX
    if before in ("0", "N"):
        PARAMETER.write_text(before, encoding="ascii")


@pytest.fixture
def emulated(pytestconfig: pytest.Config) -> None:
    """An access of L2 to memory that is not there reaches KVM's emulator, where there is a KVM."""
    if pytestconfig.getoption("--kvmnest-target") == "reference":
        pytest.skip("needs a host: KVM's emulator")
