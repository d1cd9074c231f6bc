"""L1: a VM whose payload executes one instruction after the other for Python."""

from __future__ import annotations

from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.kvm import Kvm
from kvmnest.l1.baseline import CODE_RIGHTS, L2Mode, cached_baseline
from kvmnest.l1.code import HLT, VMCALL
from kvmnest.l1.cpu import Cpu
from kvmnest.l1.execute import Executor
from kvmnest.l1.system import SystemInstructions
from kvmnest.l1.vm import L1Vm
from kvmnest.l1.vmcs import Vmcs
from kvmnest.l1.vmx import VmxInstructions
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import Succeed

#: Room for L2's code at the label ``l2_code``.
_L2_CODE = 2 * 4096


class L1(L1Vm, SystemInstructions, VmxInstructions):
    """A VM that executes instructions for Python, one a method call, and gets an L2 ready.

    Arguments and errors are those of ``L1Vm``.
    """

    def __init__(self, kvm: Kvm, **options: Any) -> None:
        super().__init__(kvm, **options)
        self.executor = Executor(self)
        self.log = self.executor.log
        self.vmcss = {}

    def reset(self) -> None:
        """Bring the VM back to the moment after creation; see ``L1Vm.reset``."""
        super().reset()
        self.log.clear()
        self.vmcss.clear()

    def enter_vmx(self, cpu: Cpu | None = None) -> None:
        """Execute VMXON with a good region; HarnessError when it does not succeed."""
        cpu = cpu or self.cpu
        region = self.sym("vmxon_region" if cpu.index == 0 else "vmxon_region_cpu1")
        self._expect(self.vmxon(self.prepare_region(region), cpu=cpu), "VMXON")

    def load_vmcs(
        self,
        region: str | int = "vmcs_a",
        *,
        mode: L2Mode = L2Mode.LONG,
        ept: bool | None = None,
        l2: str | bytes | None = None,
        cpu: Cpu | None = None,
    ) -> Vmcs:
        """VMCLEAR and VMPTRLD a region and give it the baseline; it is then current.

        ``region`` is a label of the payload or an address; ``l2`` is L2's code, as for
        ``set_l2``.
        """
        cpu = cpu or self.cpu
        address = self.sym(region) if isinstance(region, str) else region
        self.prepare_region(address)
        self._expect(self.vmclear(address, cpu=cpu), "VMCLEAR")
        self._expect(self.vmptrld(address, cpu=cpu), "VMPTRLD")
        fields = cached_baseline(self.caps, self.payload, mode, ept, cpu.index)
        vmcs = Vmcs(self.cpu, address, fields)
        self.vmcss[address] = vmcs
        if l2 is not None:
            self.set_l2(l2, vmcs)
            vmcs.rebase(Field.GUEST_RIP, Field.GUEST_CS_SELECTOR, Field.GUEST_CS_BASE)
        return vmcs

    def launchable(self, l2: str | bytes | None = None, **kwargs: Any) -> Vmcs:
        """``enter_vmx`` and ``load_vmcs``: a VMCS that VMLAUNCH accepts."""
        self.enter_vmx()
        return self.load_vmcs(l2=l2, **kwargs)

    def set_l2(self, code: str | bytes, vmcs: Vmcs | None = None) -> int:
        """Let L2 start at a label of the payload, or at the given machine code.

        Code, at most 8192 bytes, is written to ``l2_code`` with VMCALL behind it. Returns
        GUEST_RIP. In real mode CS points at the code and RIP is 0.
        """
        vmcs = vmcs or self.vmcs
        if isinstance(code, str):
            vmcs[Field.GUEST_RIP] = self.sym(code)
            return self.sym(code)
        address = self.sym("l2_code")
        content = code + VMCALL + HLT
        if len(content) > _L2_CODE:
            raise HarnessError(f"{len(content)} bytes of code, L2 has {_L2_CODE}")
        self.write(address, content)
        if vmcs.baseline.get(Field.GUEST_CS_ACCESS_RIGHTS) == CODE_RIGHTS[L2Mode.REAL]:
            vmcs[Field.GUEST_CS_SELECTOR] = address >> 4
            vmcs[Field.GUEST_CS_BASE] = address
            address = 0
        vmcs[Field.GUEST_RIP] = address
        return address

    def skip_l2_instruction(self, length: int) -> None:
        """Let L2 go on behind the instruction that caused the exit."""
        vmcs = self.vmcs
        vmcs[Field.GUEST_RIP] = vmcs[Field.GUEST_RIP] + length

    def l2_frame(self, words: int = 8, size: int = 8) -> list[int]:
        """Return what L2's exception handler reports: vector, error code, then the frame."""
        vmcs = self.vmcs
        address = vmcs[Field.GUEST_RSP]
        if size == 2:
            address += vmcs[Field.GUEST_SS_BASE]
        return [self.read_int(address + size * index, size) for index in range(words)]

    def _expect(self, outcome: object, what: str) -> None:
        if not isinstance(outcome, Succeed):
            raise HarnessError(f"{what} was expected to succeed: {outcome!r}")
