"""A vCPU in real mode with 1 MiB of memory, and machine code for it."""

from kvmnest.kvm import Memory, Vm

CODE = 0x1000
STACK = 0x8000
MEMORY = 0x100000

HLT = b"\xf4"
SPIN = b"\xeb\xfe"  # jmp $
NOP = b"\x90"


class Guest:
    """One VM with one vCPU that starts at CODE with flat real-mode segments."""

    def __init__(self, vm: Vm, *, vcpu_id: int = 0, memory: Memory | None = None) -> None:
        self.vm = vm
        if memory is None:
            memory = Memory(MEMORY)
            vm.add_memory(0, 0, memory)
        self.memory = memory
        self.vcpu = vm.create_vcpu(vcpu_id)

    def load(self, code: bytes, at: int = CODE, **registers: int) -> None:
        """Put ``code`` at ``at`` and point the vCPU to it."""
        self.memory.write(at, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = at, STACK, 2
        for name, value in registers.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)
