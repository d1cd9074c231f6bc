"""Measure this machine's KVM and print JSON: also run inside the lab's guest, as a module."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from kvmnest import host
from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.host import offers_vmx
from kvmnest.kvm import Kvm, Memory
from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1
from kvmnest.vmx import ExitReason
from kvmnest.vmx.outcome import Exit, Outcome

SCHEMA = 1
#: Every figure is the best of so many rounds: what disturbs only makes slower.
ROUNDS = 5
#: Seconds of one round.
_ROUND = 0.02
BARE = "bare KVM_RUN"
#: OUT 10H, AL and a jump back to it, in real mode.
_LOOP = b"\xe6\x10\xeb\xfc"


def best(action: Callable[[], object], per_call: int = 1) -> float:
    """Seconds of one ``action``, divided by ``per_call``: the best of ROUNDS."""
    action()
    calls, found = 1, float("inf")
    for _ in range(ROUNDS):
        while True:
            began = time.perf_counter()
            for _ in range(calls):
                action()
            spent = time.perf_counter() - began
            if spent >= _ROUND:
                break
            calls = max(calls + 1, int(calls * min(10.0, 1.2 * _ROUND / max(spent, 1e-9))))
        found = min(found, spent / calls)
    return found / per_call


@contextmanager
def _bare(kvm: Kvm) -> Iterator[Callable[[], object]]:
    """A VM whose guest does nothing but OUT: KVM_RUN there and back."""
    with closing(Memory(0x1000)) as memory, kvm.create_vm() as vm:
        memory.write(0, _LOOP)
        vm.add_memory(0, 0, memory)
        with vm.create_vcpu() as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags = 0, 2
            vcpu.set_regs(regs)
            if not isinstance(vcpu.run(), IoExit):
                raise HarnessError("the bare guest did not do its OUT")
            yield vcpu.run


def _fresh(kvm: Kvm) -> None:
    with L1(kvm) as l1:
        l1.call(b"\x90")
        l1.budget.stop()


def _expect(outcome: Outcome, wanted: Outcome) -> None:
    if outcome != wanted:
        raise HarnessError(f"got {outcome!r} instead of {wanted!r}")


def measure() -> dict[str, Any]:
    """Seconds of one of each; those of L2 only where KVM offers VMX.

    Raises KvmUnavailable without /dev/kvm, HarnessError if L1 does something else.
    """
    seconds: dict[str, float] = {}
    with Kvm() as kvm:
        with _bare(kvm) as run:
            seconds[BARE] = best(run)
        seconds["fresh L1"] = best(lambda: _fresh(kvm))
        with L1(kvm) as l1:
            l1.keep_state()
            seconds["reset of L1"] = best(l1.reset)
        with L1(kvm) as l1:
            seconds["command"] = best(lambda: l1.execute("nop", {}))
            many = [l1.command("nop", {}) for _ in range(l1.payload["SLOT_COUNT"])]
            seconds["command in a batch"] = best(lambda: l1.cpu.submit(many), len(many))
            l1.budget.stop()
        if offers_vmx(kvm):
            with L1(kvm) as l1:
                seconds |= _nested(l1)
                l1.budget.stop()
    return {
        "schema": SCHEMA,
        "kernel": host.kernel(),
        "cpu": host.cpu_model(),
        "kvm_params": host.kvm_intel_params(),
        "seconds": seconds,
    }


def _nested(l1: L1) -> dict[str, float]:
    vmcs = l1.launchable()
    wanted = Exit(ExitReason.VMCALL)
    _expect(l1.vmlaunch(), wanted)
    fields = tuple(vmcs.baseline)[:96]
    found = {
        "entry and exit, exit information read": best(lambda: _expect(l1.vmresume(), wanted)),
        "VMREAD in a list": best(lambda: l1.vmread_list(l1.cpu, fields), len(fields)),
        "VMREAD by itself": best(lambda: l1.vmread(fields[0])),
    }
    resume = l1.command("vmresume", {})
    count = l1.payload["SLOT_COUNT"]
    found["entry and exit in a batch"] = best(lambda: l1.cpu.submit([resume] * count), count)
    return found


def main() -> int:
    """Print the figures; returns an exit code."""
    try:
        print(json.dumps(measure()))
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
