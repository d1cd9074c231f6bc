"""A VM that ends while its L2 is active: by closing it, or with its process.

What the kernel logs meanwhile fails the case. KVM's API documentation, "General description": a VM
and its vCPUs live as long as file descriptors refer to them.
"""

from __future__ import annotations

import os
import signal

import pytest

from kvmnest.kvm import Kvm
from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx.outcome import HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
]

#: Tell the parent by a byte in its pipe, then spin: see _child.
SPIN = code.out8(0x80) + code.JMP_SELF


def _stop_in_l2(l1: L1, snippet: bytes = code.out8(0x80)) -> Guest:
    guest = Guest(l1)
    seen = guest.run(snippet)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, IoExit)
    return guest


def check_works(kvm: Kvm) -> None:
    """Another VM enters L2 as ever."""
    with L1(kvm) as l1:
        guest = _stop_in_l2(l1)
        assert guest.resume() == Succeed()
        assert guest.run(code.NOP) == Succeed()


@pytest.mark.parametrize("order", ["vcpu-first", "vm-first"])
def test_closed(kvm: Kvm, order: str) -> None:
    """The last file descriptor goes while L2 is active, whichever it is."""
    for _ in range(3):
        l1 = L1(kvm)
        _stop_in_l2(l1)
        if order == "vm-first":
            l1.vm.close()
        l1.close()
    check_works(kvm)


def _child(end: str, tell: int) -> None:
    """Enter L2 in a new process and end that there; never returns."""
    status = 1
    try:
        with Kvm() as kvm:
            l1 = L1(kvm, budget=0)
            guest = _stop_in_l2(l1, SPIN if end == "killed-in-L2" else code.out8(0x80))
            os.write(tell, b"!")
            if end == "killed-in-L2":
                guest.resume()
            elif end == "killed":
                signal.pause()
            status = 0
            # Without a close of anything: what is open goes with the process.
            os._exit(status)
    finally:
        os._exit(status)


@pytest.mark.parametrize("end", ["exit", "killed", "killed-in-L2"])
def test_process_ends(kvm: Kvm, end: str) -> None:
    """A process ends with everything open: by itself, or killed outside or inside KVM_RUN."""
    for _ in range(3):
        listen, tell = os.pipe()
        child = os.fork()
        if child == 0:
            _child(end, tell)
        os.close(tell)
        try:
            assert os.read(listen, 1) == b"!", "the child got no L2"
            if end != "exit":
                os.kill(child, signal.SIGKILL)
        finally:
            os.close(listen)
            _, status = os.waitpid(child, 0)
        if end == "exit":
            assert os.waitstatus_to_exitcode(status) == 0
        else:
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    check_works(kvm)
