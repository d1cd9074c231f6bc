"""After Ctrl-C or a hang: bring a vCPU that did not come back into L1's command loop again."""

from __future__ import annotations

from kvmnest.errors import KvmnestError
from kvmnest.kvm import Cap, KvmError
from kvmnest.kvm.exit_codes import ExitCode
from kvmnest.l1 import L1
from kvmnest.l1.cpu import Cpu

_NESTED_GUEST_MODE = 1  # KVM_STATE_NESTED_GUEST_MODE
_VALID_TRIPLE_FAULT = 0x20  # KVM_VCPUEVENT_VALID_TRIPLE_FAULT


def regain(l1: L1) -> str | None:
    """Stop what still runs in ``l1``; a sentence about it, "" if nothing ran, None if L1 is lost.

    An L2 leaves by the exit that needs no control set: a triple fault, which KVM takes from
    userspace (KVM_CAP_X86_TRIPLE_FAULT_EVENT, Linux 6.0). Its registers are in the VMCS as they
    were. Code of L1 itself is sent to the instruction that ends a snippet.
    """
    said = ""
    for cpu in l1.cpus:
        if not cpu.suspended:
            continue
        run = cpu.vcpu.kvm_run
        reason = run.exit_reason
        if reason == ExitCode.UNKNOWN or (
            reason == ExitCode.IO and run.io.port == l1.payload["PORT_DONE"]
        ):
            # The signal came before KVM_RUN or after its end: the payload waits for commands.
            cpu.suspended = False
        elif reason == ExitCode.INTR:
            try:
                said = _stop(l1, cpu)
            except (KvmError, KvmnestError):
                return None
            if cpu.suspended:
                return None
    return said


def _stop(l1: L1, cpu: Cpu) -> str:
    vcpu = cpu.vcpu
    regs = vcpu.get_regs()
    rip = regs.rip
    in_l2 = l1.has_vmx and vcpu.get_nested_state()[0] & _NESTED_GUEST_MODE
    if in_l2:
        l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
        events = vcpu.get_vcpu_events()
        events.triple_fault.pending = 1
        events.flags |= _VALID_TRIPLE_FAULT
        vcpu.set_vcpu_events(events)
    else:
        regs.rip = l1.sym("done64" if vcpu.get_sregs().cs.l else "done32")
        vcpu.set_regs(regs)
    vcpu.set_mp_state(0)  # KVM_MP_STATE_RUNNABLE: it may be in HLT
    l1.budget.stop()
    l1.budget.used_up = False
    cpu.resume()
    if in_l2:
        return f"L2 is stopped at RIP {rip:#x}, by a triple-fault exit; L1 lives"
    return f"L1's code is stopped at RIP {rip:#x}; L1 lives"
