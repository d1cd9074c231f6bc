"""Periodic VM exits for a vCPU in the lab, so that a loop can be interrupted there.

Bochs holds back external interrupts while a guest has RFLAGS.IF = 0, although "external-interrupt
exiting" is 1: a loop then stops every clock of the emulated machine, and no signal arrives. The
VMX-preemption timer expires all the same, and KVM runs a guest's local APIC timer by it. Here
that timer is periodic and masked: L1 and L2 see none of it but the counts in the APIC's registers.

A loop of L1 itself with IF = 0 stays: KVM goes back into it without looking at interrupts.
"""

from __future__ import annotations

from kvmnest.l1 import L1

# Offsets and values of the local APIC's registers (SDM, "APIC Timer").
_LVT_TIMER, _MASKED, _PERIODIC = 0x320, 1 << 16, 1 << 17
_DIVIDE_CONFIGURATION, _BY_128 = 0x3E0, 0b1010
_INITIAL_COUNT = 0x380
_COUNT = 100_000_000 // 128  # 0.1 s: KVM's APIC bus has 1 GHz


def start(l1: L1) -> None:
    """Let the timer of L1's first vCPU run, before its first command."""
    vcpu = l1.cpu.vcpu
    lapic = vcpu.get_lapic()
    registers = {
        _DIVIDE_CONFIGURATION: _BY_128,
        _LVT_TIMER: _MASKED | _PERIODIC,
        _INITIAL_COUNT: _COUNT,
    }
    for offset, value in registers.items():
        for at, byte in enumerate(value.to_bytes(4, "little")):
            lapic.regs[offset + at] = byte
    vcpu.set_lapic(lapic)
