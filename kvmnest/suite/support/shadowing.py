"""VMCS shadowing that L1 gives to L2: the bitmaps, the shadow VMCS, L2's VMREAD and VMWRITE."""

from __future__ import annotations

from collections.abc import Iterable

from kvmnest.l1 import L1
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Field, Proc2Ctl
from kvmnest.vmx.outcome import Outcome, Succeed
from kvmnest.vmx.registers import STATUS_FLAGS

#: VMREAD RBX, RAX and VMWRITE RAX, RBX: the field in RAX, the value in RBX.
READ = b"\x0f\x78\xc3"
WRITE = b"\x0f\x79\xc3"
#: The same with the value at [RDI].
READ_MEMORY = b"\x0f\x78\x07"
WRITE_MEMORY = b"\x0f\x79\x07"
#: PUSHFQ; POP R15 behind an instruction tells its flags.
FLAGS = b"\x9c\x41\x5f"
SHADOW = 1 << 31


class Shadowing:
    """A guest with VMCS shadowing, no field of which exits, and a shadow VMCS of its own."""

    def __init__(self, l1: L1, *, ept: bool | None = None) -> None:
        self.l1 = l1
        self.guest = Guest(l1, Proc2Ctl.VMCS_SHADOWING, ept=ept)
        self.region = l1.sym("shadow_vmcs")
        l1.prepare_region(self.region, l1.caps.basic.revision_id | SHADOW)
        assert l1.vmclear(self.region) == Succeed()
        vmcs = self.guest.vmcs
        vmcs[Field.VMREAD_BITMAP] = l1.sym("vmread_bitmap")
        vmcs[Field.VMWRITE_BITMAP] = l1.sym("vmwrite_bitmap")
        vmcs[Field.VMCS_LINK_POINTER] = self.region
        # The guest's own VMCS is written before another one becomes current.
        vmcs.flush()

    def __repr__(self) -> str:
        return f"<Shadowing with the shadow VMCS at {self.region:#x}>"

    def exits(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        """Let VMREAD and VMWRITE of exactly these fields exit."""
        for name, fields in (("vmread_bitmap", reads), ("vmwrite_bitmap", writes)):
            bits = bytearray(4096)
            for field in fields:
                bits[field // 8] |= 1 << field % 8
            self.l1.write(self.l1.sym(name), bytes(bits))

    def exits_all_but(self, field: int) -> None:
        """Let VMREAD and VMWRITE of every field but one exit."""
        bits = bytearray(b"\xff" * 4096)
        bits[field // 8] &= ~(1 << field % 8)
        for name in ("vmread_bitmap", "vmwrite_bitmap"):
            self.l1.write(self.l1.sym(name), bytes(bits))

    def fill(self, values: dict[Field, int]) -> None:
        """Write fields of the shadow VMCS from L1, which makes it current for a moment."""
        l1 = self.l1
        assert l1.vmptrld(self.region) == Succeed()
        for field, value in values.items():
            assert l1.vmwrite(field, value) == Succeed(), field
        self._back()

    def content(self, *fields: Field) -> dict[Field, int]:
        """Read fields of the shadow VMCS from L1."""
        l1 = self.l1
        assert l1.vmptrld(self.region) == Succeed()
        values = {Field(f): value for f, value, _ in l1.vmread_list(l1.cpu, fields)}
        self._back()
        return values

    def _back(self) -> None:
        assert self.l1.vmclear(self.region) == Succeed()
        assert self.l1.vmptrld(self.guest.vmcs.address) == Succeed()

    def read(self, field: int) -> Outcome:
        """VMREAD in L2: value in RBX, flags in R15."""
        return self.guest.run(READ + FLAGS, {"rax": field}, GUEST_RFLAGS=2 | STATUS_FLAGS)

    def write(self, field: int, value: int) -> Outcome:
        """VMWRITE in L2: flags in R15."""
        return self.guest.run(
            WRITE + FLAGS, {"rax": field, "rbx": value}, GUEST_RFLAGS=2 | STATUS_FLAGS
        )


def flags(seen: Outcome) -> int:
    """Status flags that an instruction of L2 left."""
    assert seen == Succeed()
    return int(seen.regs["r15"]) & STATUS_FLAGS
