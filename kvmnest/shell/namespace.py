"""What the prompt offers: a live L1, the architecture's names, and a few helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmnest.kvm import Kvm
from kvmnest.l1 import L1, Vmcs, VmLost, code
from kvmnest.l1.objections import objections
from kvmnest.shell.errors import describe
from kvmnest.shell.regain import regain
from kvmnest.shell.vocabulary import vocabulary
from kvmnest.vmx import EntryCtl, ExitReason, Field, Rflags, Vector, explain, outcome

#: Seconds after which an L2 that does not come back is given up.
BUDGET = 5.0
#: Begins a line that the prompt replaces by a disassembly: address, bits, bytes.
CODE_LINE = "\x1ecode"

HELP = """\
l1.vmxon(), l1.vmclear(address), l1.vmptrld(address), l1.vmlaunch()...  one instruction each
l1.launchable()    VMXON, VMCLEAR, VMPTRLD and the smallest legal VMCS; then l1.vmlaunch()
vmcs[Field.GUEST_RIP], vmcs[Field.GUEST_RFLAGS] = 2, vmcs.diff()        the current VMCS
dump("GUEST_C*")   VMCS fields decoded      rules()  what the SDM's rules say of this VMCS
step()             one instruction of L2    dis()    code at L2's RIP, or dis(address)
new()              a new L1, in place of this one
Ctrl-C stops a statement, or an L2 that loops; Tab completes; Ctrl-D ends
l1.set_l2(code.CPUID + code.HLT), Exit(ExitReason.CPUID), explain.explain_exit(...)"""


class _Current:
    """The current VMCS, whichever that is."""

    def __init__(self, space: Namespace) -> None:
        object.__setattr__(self, "_space", space)

    def _vmcs(self) -> Vmcs:
        return self._space.l1.vmcs  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vmcs(), name)

    def __getitem__(self, field: int) -> int:
        return self._vmcs()[field]

    def __setitem__(self, field: int, value: int) -> None:
        self._vmcs()[field] = value

    def __repr__(self) -> str:
        return f"<VMCS at {self._vmcs().address:#x}>"


class Namespace:
    """The prompt's names, as a dict in ``names``. Raises KvmUnavailable without /dev/kvm.

    ``prepare`` is called with each new L1 before its first command.
    """

    def __init__(
        self, write: Callable[[str], object], prepare: Callable[[L1], object] | None = None
    ) -> None:
        self._write, self._prepare = write, prepare
        self._kvm = Kvm()
        self.l1 = self._new()
        self.names: dict[str, Any] = {
            **vocabulary(),
            **{"kvm": self._kvm, "l1": self.l1, "vmcs": _Current(self)},
            **{"dump": self.dump, "rules": self.rules, "step": self.step, "dis": self.dis},
            **{"new": self.new},
        }

    def run(self, source: str) -> None:
        """Execute one complete statement and show its value or its error."""
        try:
            exec(compile(source, "<kvmnest>", "single"), self.names)
        except SystemExit:
            raise
        except BaseException as error:
            # At once, not at the end: nothing of the budget may run while L1 is regained.
            self.l1.budget.stop()
            self._write(describe(error, self.names))
            if isinstance(error, (KeyboardInterrupt, VmLost)):
                # Only a vCPU that could run on can be led back.
                lost = isinstance(error, VmLost) and error.kind != "hang"
                self._go_on(None if lost else regain(self.l1))
        finally:
            self.l1.budget.stop()

    def _go_on(self, said: str | None) -> None:
        """Show what became of L1; None: make a new one."""
        if said is None:
            self.new()
            said = "this L1 cannot go on: l1 is a new one, without VMCS"
        if said:
            self._write(said + "\n")

    def _new(self) -> L1:
        l1 = L1(self._kvm, budget=BUDGET)
        if self._prepare is not None:
            self._prepare(l1)
        return l1

    def close(self) -> None:
        """Destroy the VM."""
        self.l1.close()
        self._kvm.close()

    def new(self) -> L1:
        """Replace L1 by a new one."""
        self.l1.close()
        self.l1 = self._new()
        self.names["l1"] = self.l1
        return self.l1

    def dump(self, pattern: str = "*") -> None:
        """Show the fields of the current VMCS that ``pattern`` (as in a shell) names, decoded."""
        from fnmatch import fnmatchcase

        vmcs = self.l1.vmcs
        shown = [f for f in Field if fnmatchcase(f.name, pattern) and self.l1.caps.field_exists(f)]
        vmcs.flush()
        for field in shown:
            ((_, value, rflags),) = self.l1.vmread_list(self.l1.cpu, (field,))
            text = explain.explain_field_value(field, value)
            if rflags & (Rflags.CF | Rflags.ZF):
                text = "VMREAD fails"
            self._write(f"{field.name:32} {text}\n")

    def rules(self) -> None:
        """Show which rules of VM entry the current VMCS breaks."""
        self.l1.vmcs.flush()
        broken = objections(self.l1)
        for violation in broken:
            self._write(f"{violation.stage.name}: {violation}\n")
        if not broken:
            self._write("no rule objects: VM entry succeeds\n")

    def step(self) -> Any:
        """Execute one instruction of L2: RFLAGS.TF is set, and #DB exits; returns the outcome.

        Where RFLAGS.TF makes L2 exit before the instruction, as in the lab when KVM has to map
        the page of code first, the page is mapped and the step tried again.
        """
        rip = self.l1.vmcs[Field.GUEST_RIP]
        seen = self._step()
        early = isinstance(seen, outcome.Exit) and seen.rip == rip
        if early and seen.reason == ExitReason.EXCEPTION_NMI:
            self._map(rip)
            seen = self._step()
        if isinstance(seen, outcome.Exit):
            self.dis(count=1)
        return seen

    def _map(self, rip: int) -> None:
        """Let L2 execute a VMCALL at the other end of its page of code, then as it was."""
        page = rip & ~0xFFF
        at = page if rip & 0xFFF > 0x800 else page + 0xFF0
        kept = self.l1.read(at, 3)
        self.l1.write(at, code.VMCALL)
        self.l1.vmcs[Field.GUEST_RIP] = at
        self.l1.vmresume()
        self.l1.write(at, kept)
        self.l1.vmcs[Field.GUEST_RIP] = rip

    def _step(self) -> Any:
        vmcs = self.l1.vmcs
        flags, bitmap = vmcs[Field.GUEST_RFLAGS], vmcs[Field.EXCEPTION_BITMAP]
        vmcs[Field.GUEST_RFLAGS] = flags | Rflags.TF
        vmcs[Field.EXCEPTION_BITMAP] = bitmap | 1 << Vector.DB
        seen = self.l1.vmresume()
        if isinstance(seen, outcome.VMfailValid):
            seen = self.l1.vmlaunch()
        entered = isinstance(seen, outcome.Exit)
        after = vmcs[Field.GUEST_RFLAGS] if entered else flags
        vmcs[Field.GUEST_RFLAGS] = after & ~Rflags.TF if not flags & Rflags.TF else after
        vmcs[Field.EXCEPTION_BITMAP] = bitmap
        if entered and seen.reason == ExitReason.EXCEPTION_NMI:
            vmcs[Field.GUEST_PENDING_DBG_EXCEPTIONS] = 0
        return seen

    def dis(self, address: int | None = None, count: int = 6) -> None:
        """Disassemble ``count`` instructions at L2's RIP, or of 64-bit code at ``address``."""
        bits, base = 64, 0
        if address is None:
            vmcs = self.l1.vmcs
            rights = vmcs[Field.GUEST_CS_ACCESS_RIGHTS]
            long_mode = vmcs[Field.VM_ENTRY_CONTROLS] & EntryCtl.IA32E_MODE_GUEST
            bits = 64 if long_mode and rights >> 13 & 1 else 32 if rights >> 14 & 1 else 16
            base = 0 if bits == 64 else vmcs[Field.GUEST_CS_BASE]
            address = vmcs[Field.GUEST_RIP]
        room = self.l1.payload["RAM_SIZE"] - base - address
        if room <= 0:
            self._write(f"{address:#x} is not in L1's memory\n")
            return
        content = self.l1.read(base + address, min(15 * count, room))
        self._write(f"{CODE_LINE} {address:#x} {bits} {count} {content.hex()}\n")
