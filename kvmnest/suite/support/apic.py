"""L1's local APIC in x2APIC mode, and the I/O APIC of a VM that has one."""

from __future__ import annotations

from kvmnest.l1 import L1
from kvmnest.l1.cpu import Cpu
from kvmnest.vmx import Msr
from kvmnest.vmx.outcome import Succeed

#: Bits 11:10 of IA32_APIC_BASE: APIC enabled, in x2APIC mode.
X2APIC = 0xC00
#: Spurious-interrupt vector register: APIC enabled by software, vector 255.
ENABLED = 0x1FF
#: Delivery modes, of the interrupt command and of a message-signaled interrupt.
FIXED, NMI, INIT, SIPI = 0, 4 << 8, 5 << 8, 6 << 8
#: Address of a message-signaled interrupt to APIC 0.
TO_APIC_0 = 0xFEE00000
#: Divide configuration of the timer.
_DIVIDE_BY_1 = 0b1011
_IF = 0x202


class Apic:
    """The local APIC of L1's first vCPU; what L1 takes is counted and acknowledged."""

    def __init__(self, l1: L1) -> None:
        self.l1 = l1
        base = l1.rdmsr(Msr.APIC_BASE)
        assert isinstance(base, Succeed)
        assert l1.wrmsr(Msr.APIC_BASE, base.value | X2APIC) == Succeed()
        assert l1.wrmsr(Msr.X2APIC_SIVR, ENABLED) == Succeed()
        l1.write_int(l1.cpu.block + l1.sym("CPU_EOI"), l1.sym("EOI_X2APIC"))

    def __repr__(self) -> str:
        return "<Apic of L1's first vCPU>"

    def send(self, vector: int) -> None:
        """Send an interrupt to L1 itself; it waits, since L1 runs with RFLAGS.IF clear."""
        assert self.l1.wrmsr(Msr.X2APIC_SELF_IPI, vector) == Succeed()

    def start_timer(self, vector: int, count: int) -> None:
        """Send an interrupt when the timer, which starts now, has counted ``count`` to 0."""
        for msr, value in (
            (Msr.X2APIC_DIV_CONF, _DIVIDE_BY_1),
            (Msr.X2APIC_LVT_TIMER, vector),  # one-shot
            (Msr.X2APIC_INIT_COUNT, count),
        ):
            assert self.l1.wrmsr(msr, value) == Succeed()

    def requested(self) -> list[int]:
        """Vectors that wait (the interrupt-request register)."""
        return self._bits(Msr.X2APIC_IRR0)

    def in_service(self) -> list[int]:
        """Vectors that were taken and not yet acknowledged (the in-service register)."""
        return self._bits(Msr.X2APIC_ISR0)

    def _bits(self, first: int) -> list[int]:
        vectors = []
        for number in range(8):
            part = self.l1.rdmsr(first + number)
            assert isinstance(part, Succeed)
            vectors += [32 * number + bit for bit in range(32) if part.value >> bit & 1]
        return vectors

    def end(self) -> None:
        """Acknowledge the interrupt in service (EOI)."""
        assert self.l1.wrmsr(Msr.X2APIC_EOI, 0) == Succeed()

    def open_window(self) -> list[int]:
        """Let L1 run an instruction with RFLAGS.IF set; the vectors that it takes."""
        before = self._count("CPU_IRQ_COUNT")
        assert self.l1.call(b"\x90", rflags=_IF) == Succeed()
        vectors = self.l1.cpu.block + self.l1.sym("CPU_IRQ_VECTORS")
        taken = range(before, self._count("CPU_IRQ_COUNT"))
        return [self.l1.read_int(vectors + number % 16, 1) for number in taken]

    @property
    def interrupts(self) -> int:
        """External interrupts that L1 took."""
        return self._count("CPU_IRQ_COUNT")

    @property
    def nmis(self) -> int:
        """NMIs that L1 took."""
        return self._count("CPU_NMI_COUNT")

    def _count(self, name: str) -> int:
        return self.l1.read_int(self.l1.cpu.block + self.l1.sym(name))


def send_in_l2(vector: int) -> dict[str, int]:
    """Registers with which WRMSR in L2 sends the vCPU an interrupt (MSR bitmaps open)."""
    return {"rcx": Msr.X2APIC_SELF_IPI, "rax": vector, "rdx": 0}


def send_nmi_in_l2() -> dict[str, int]:
    """Registers with which WRMSR in L2 sends the vCPU an NMI (MSR bitmaps open)."""
    return {"rcx": Msr.X2APIC_ICR, "rax": NMI, "rdx": 0}  # to APIC 0


class IoApic:
    """The I/O APIC of an L1 with ``irqchip="full"``, by its registers in memory.

    Source: data sheet "82093AA I/O Advanced Programmable Interrupt Controller", "Memory mapped
    registers" and "I/O redirection table registers". Its pin n is GSI n for n from 16 on.
    """

    _INDEX, _TABLE = 0xFEC00000, 0x10
    _SELECT_AND_WRITE = b"\x89\x07\x89\x5f\x10"  # MOV [RDI], EAX; MOV [RDI+16], EBX
    _SELECT_AND_READ = b"\x89\x07\x8b\x5f\x10"  # MOV [RDI], EAX; MOV EBX, [RDI+16]
    _REMOTE_IRR, _LEVEL, _MASKED = 1 << 14, 1 << 15, 1 << 16

    def __init__(self, l1: L1) -> None:
        self.l1 = l1

    def __repr__(self) -> str:
        return "<I/O APIC>"

    def redirect(
        self,
        pin: int,
        vector: int,
        *,
        level: bool = True,
        masked: bool = False,
        cpu: Cpu | None = None,
    ) -> None:
        """Let a pin send a vector to APIC 0, level- or edge-triggered; ``cpu`` writes it."""
        low = vector | self._LEVEL * level | self._MASKED * masked
        self._access(self._SELECT_AND_WRITE, self._TABLE + 2 * pin + 1, 0, cpu)
        self._access(self._SELECT_AND_WRITE, self._TABLE + 2 * pin, low, cpu)

    def remote_irr(self, pin: int) -> bool:
        """Whether a local APIC took the level-triggered interrupt of a pin, and sent no EOI yet."""
        low = self._access(self._SELECT_AND_READ, self._TABLE + 2 * pin, 0, None)
        return bool(low & self._REMOTE_IRR)

    def _access(self, code: bytes, register: int, value: int, cpu: Cpu | None) -> int:
        regs = {"rdi": self._INDEX, "rax": register, "rbx": value}
        done = self.l1.call(code, regs=regs, cpu=cpu or self.l1.cpu)
        assert isinstance(done, Succeed)
        return int(done.regs["rbx"]) & 0xFFFFFFFF
