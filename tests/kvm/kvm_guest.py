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
        """Put ``code`` at ``at`` and point the vCPU to it, with interrupts on.

        Bochs 2.7, on which the lab runs KVM, takes no interrupt of the host while a guest loops
        with IF clear: the host would stop for good.
        """
        self.memory.write(at, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = at, STACK, 0x202
        for name, value in registers.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def load_long(self, code: bytes, at: int = CODE, **registers: int) -> None:
        """As load(), in 64-bit mode: the first 2 MiB are mapped 1:1, no IDT."""
        self.memory.write(0x10000, (0x11003).to_bytes(8, "little"))  # PML4E: present, writable
        self.memory.write(0x11000, (0x12003).to_bytes(8, "little"))  # PDPTE
        self.memory.write(0x12000, (0x83).to_bytes(8, "little"))  # PDE of 2 MiB
        self.load(code, at, **registers)
        sregs = self.vcpu.get_sregs()
        sregs.cr3 = 0x10000
        sregs.cr4 |= 1 << 5  # PAE
        sregs.cr0 |= 1 << 31 | 1  # PG, PE
        sregs.efer |= 1 << 10 | 1 << 8  # LMA, LME
        sregs.cs.type, sregs.cs.l, sregs.cs.db, sregs.cs.s = 11, 1, 0, 1
        sregs.cs.present, sregs.cs.g, sregs.cs.limit, sregs.cs.selector = 1, 1, 0xFFFFFFFF, 8
        for name in ("ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.type, segment.s, segment.present, segment.g = 3, 1, 1, 1
            segment.db, segment.limit, segment.selector, segment.base = 1, 0xFFFFFFFF, 16, 0
        sregs.idt.base = sregs.idt.limit = 0
        self.vcpu.set_sregs(sregs)
