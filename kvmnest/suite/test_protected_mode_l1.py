"""An L1 in protected mode: operands through segments, 32-bit VMREAD and VMWRITE, a 32-bit host."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.l1.baseline import cached_baseline
from kvmnest.suite.support.protected import Done, Exited, Faulted, ProtectedL1
from kvmnest.vmx import Cr4, EntryCtl, ExitCtl, ExitReason, Field, ProcCtl, Rflags, Vector, VmxError

pytestmark = [pytest.mark.series(7), pytest.mark.sdm("VMX Instruction Reference")]

# With the operand at [EDI], the field in EAX, the value in EBX.
VMXON = b"\xf3\x0f\xc7\x37"
VMXOFF = b"\x0f\x01\xc4"
VMCLEAR = b"\x66\x0f\xc7\x37"
VMPTRLD = b"\x0f\xc7\x37"
VMPTRST = b"\x0f\xc7\x3f"
VMREAD = b"\x0f\x78\xc3"
VMREAD_MEMORY = b"\x0f\x78\x07"
VMWRITE = b"\x0f\x79\xc3"
VMWRITE_MEMORY = b"\x0f\x79\x07"
VMLAUNCH = b"\x0f\x01\xc2"
CS, SS, FS = b"\x2e", b"\x36", b"\x64"

GP, STACK = Faulted(Vector.GP, 0), Faulted(Vector.SS, 0)
FAILED_VALID = Done(int(Rflags.ZF))
#: Types of segments: data read-only, expand-down, code execute-only and readable.
READ_ONLY, DOWN, EXECUTE_ONLY, READABLE = 1, 3, 9, 11


@pytest.fixture
def pl1(l1: L1) -> ProtectedL1:
    """An L1 in protected mode, in VMX root operation with a current VMCS."""
    l1.launchable(mode=L2Mode.PAE).flush()
    return ProtectedL1(l1)


def _pointer(pl1: ProtectedL1, at: int, address: int) -> int:
    pl1.l1.write_int(pl1.data + at, address)
    return pl1.data + at


@pytest.mark.sdm("VMXON-Enter VMX Operation")
def test_life_of_vmx_operation(l1: L1) -> None:
    """VMXON to VMXOFF; pointers have 64 bits in this mode too."""
    pl1 = ProtectedL1(l1)
    region = l1.prepare_region(l1.sym("vmxon_region"))
    vmcs = l1.prepare_region(l1.sym("vmcs_a"))
    assert pl1.run(VMXOFF) == Faulted(Vector.UD)
    assert pl1.run(VMXON, rdi=_pointer(pl1, 0, region)) == Done()
    assert pl1.run(VMCLEAR, rdi=_pointer(pl1, 8, vmcs)) == Done()
    assert pl1.run(VMPTRLD, rdi=pl1.data + 8) == Done()
    l1.write_int(pl1.data + 16, (1 << 64) - 1)
    assert pl1.run(VMPTRST, rdi=pl1.data + 16) == Done()
    assert l1.read_int(pl1.data + 16) == vmcs
    # A pointer above 4 GiB is no good one, although registers have 32 bits.
    assert pl1.run(VMPTRLD, rdi=_pointer(pl1, 24, vmcs | 1 << 60)) == FAILED_VALID
    assert pl1.run(VMXOFF) == Done()


@pytest.mark.sdm("VMREAD-Read Field from Virtual-Machine Control Structure")
def test_halves_of_a_64_bit_field(pl1: ProtectedL1) -> None:
    """A full access moves bits 31:0, and clears the others; a high access moves bits 63:32."""
    field = int(Field.TSC_OFFSET)
    for at, value in ((field, 0x11223344), (field + 1, 0x55667788)):
        assert pl1.run(VMWRITE, rax=at, rbx=value) == Done()
    for at, value in ((field, 0x11223344), (field + 1, 0x55667788)):
        assert _field(pl1, at) == value
        pl1.l1.write_int(pl1.data, (1 << 64) - 1)
        assert pl1.run(VMREAD_MEMORY, rax=at, rdi=pl1.data) == Done()
        assert pl1.l1.read_int(pl1.data) == value | 0xFFFFFFFF << 32
    assert pl1.run(VMWRITE, rax=field, rbx=0x99) == Done()
    assert _field(pl1, field + 1) == 0


@pytest.mark.sdm("VMWRITE-Write Field to Virtual-Machine Control Structure")
def test_write_from_memory_takes_32_bits(pl1: ProtectedL1) -> None:
    """VMWRITE reads 4 bytes of memory, and clears bits 63:32 of a natural-width field."""
    pl1.l1.write_int(pl1.data, 0xAABBCCDD_11223344)
    field = int(Field.GUEST_SYSENTER_EIP)
    assert pl1.run(VMWRITE_MEMORY, rax=field, rdi=pl1.data) == Done()
    assert _field(pl1, field) == 0x11223344
    # The last 4 bytes that the segment has are enough.
    pl1.segments = {"ds": {"limit": pl1.data + 0xFFF, "g": 1}}
    end = pl1.data + 0xFFC
    assert pl1.run(VMWRITE_MEMORY, rax=field, rdi=end) == Done()
    assert pl1.run(VMWRITE_MEMORY, rax=field, rdi=end + 1) == GP


#: Segment of the operand, its prefix, what it is changed to, then the outcome of an instruction
#: that reads 8 bytes at the end of the data page, and of one that writes them.
_SEGMENTS = {
    "read_only": ("ds", b"", {"type": READ_ONLY}, Done(), GP),
    "code_readable": ("cs", CS, {"type": READABLE}, Done(), GP),
    "code_execute_only": ("cs", CS, {"type": EXECUTE_ONLY}, GP, GP),
    "unusable": ("ds", b"", {"unusable": 1, "present": 0, "selector": 0}, GP, GP),
    "unusable_fs": ("fs", FS, {"unusable": 1, "present": 0, "selector": 0}, GP, GP),
}


@pytest.mark.parametrize("name", _SEGMENTS)
@pytest.mark.sdm("VMPTRST-Store Pointer to Virtual-Machine Control Structure")
def test_segment_of_the_operand(pl1: ProtectedL1, name: str) -> None:
    """#GP(0) for what may not be read or written through the segment, or one that is unusable."""
    segment, prefix, changes, read, written = _SEGMENTS[name]
    where = _pointer(pl1, 0xFF8, pl1.l1.vmcs.address)
    pl1.segments = {segment: changes}
    assert pl1.run(prefix + VMPTRLD, rdi=where) == read
    assert pl1.run(prefix + VMPTRST, rdi=where) == written


@pytest.mark.parametrize(("segment", "prefix", "fault"), [("ds", b"", GP), ("ss", SS, STACK)])
@pytest.mark.sdm("VMPTRLD-Load Pointer to Virtual-Machine Control Structure")
def test_limit(pl1: ProtectedL1, segment: str, prefix: bytes, fault: Faulted) -> None:
    """The last byte of the operand counts: #SS(0) through SS, else #GP(0)."""
    where = _pointer(pl1, 0xFF8, pl1.l1.vmcs.address)
    pl1.segments = {segment: {"limit": pl1.data + 0xFFF, "g": 1}}
    assert pl1.run(prefix + VMPTRLD, rdi=where) == Done()
    assert pl1.run(prefix + VMPTRLD, rdi=where + 1) == fault
    assert pl1.run(prefix + VMPTRST, rdi=where + 4) == fault
    assert pl1.run(prefix + VMPTRST, rdi=where + 8) == fault


@pytest.mark.sdm("VMPTRLD-Load Pointer to Virtual-Machine Control Structure")
def test_expand_down(pl1: ProtectedL1) -> None:
    """Offsets in an expand-down segment are those above its limit."""
    where = _pointer(pl1, 0xFF8, pl1.l1.vmcs.address)
    pl1.segments = {"ds": {"type": DOWN, "limit": pl1.data - 1, "g": 1}}
    assert pl1.run(VMPTRLD, rdi=where) == Done()
    pl1.segments = {"ds": {"type": DOWN, "limit": pl1.data + 0xFFF, "g": 1}}
    assert pl1.run(VMPTRLD, rdi=where) == GP


@pytest.mark.sdm("VMPTRLD-Load Pointer to Virtual-Machine Control Structure")
def test_base(pl1: ProtectedL1) -> None:
    """Base and offset are added to 32 bits."""
    where = _pointer(pl1, 0x10, pl1.l1.vmcs.address)
    for base in (0x1000, 0xFFFFF000):
        pl1.segments = {"ds": {"base": base}}
        assert pl1.run(VMPTRLD, rdi=where - base & 0xFFFFFFFF) == Done(), base


def _launch(l1: L1, changes: dict[Field, int]) -> tuple[ProtectedL1, object]:
    """VMLAUNCH in protected mode, with host state of that mode but for the changes."""
    vmcs = l1.launchable(mode=L2Mode.PAE)
    pl1 = ProtectedL1(l1)
    state = pl1.state
    vmcs.clear_bits(Field.VM_EXIT_CONTROLS, ExitCtl.HOST_ADDRESS_SPACE_SIZE)
    vmcs.update({
        Field.HOST_CR0: state[Field.GUEST_CR0],
        Field.HOST_CR3: state[Field.GUEST_CR3],
        Field.HOST_CR4: state[Field.GUEST_CR4] | Cr4.VMXE,
        Field.HOST_CS_SELECTOR: state[Field.GUEST_CS_SELECTOR],
        Field.HOST_RIP: pl1.host_rip,
        Field.HOST_RSP: pl1.stack,
        Field.HOST_IDTR_BASE: pl1.idt,
    })  # fmt: skip
    vmcs.update(changes)
    # Natural-width fields get their upper halves in 64-bit mode only.
    vmcs.flush()
    return pl1, pl1.run(VMLAUNCH)


def _field(pl1: ProtectedL1, field: int) -> int:
    seen = pl1.run(VMREAD, rax=int(field), rbx=0x77)
    assert isinstance(seen, Done)
    return int(seen.regs.rbx)


@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_exit_to_protected_mode(l1: L1) -> None:
    """A VM exit without "host address-space size" loads a 32-bit CS, and IA32_EFER.LMA is 0."""
    pl1, seen = _launch(l1, {})
    assert seen == Exited()
    sregs = pl1.vcpu.get_sregs()
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.cs.limit) == (0, 1, 0, 0xFFFFFFFF)
    assert (sregs.efer & 0x500, sregs.cr3) == (0, pl1.state[Field.GUEST_CR3])
    assert _field(pl1, Field.VM_EXIT_REASON) == ExitReason.VMCALL


_BAD = {
    "rip_above_4g": {Field.HOST_RIP: 1 << 32},
    "ss_null": {Field.HOST_SS_SELECTOR: 0},
    "fs_base_not_canonical": {Field.HOST_FS_BASE: 1 << 63},
}


@pytest.mark.parametrize("name", _BAD)
@pytest.mark.sdm("Checks on Host Segment and Descriptor-Table Registers")
def test_host_state_of_protected_mode(l1: L1, name: str) -> None:
    """A 32-bit host needs SS, and RIP below 4 GiB; bases are canonical as ever: error 8."""
    pl1, seen = _launch(l1, _BAD[name])
    assert seen == FAILED_VALID
    assert _field(pl1, Field.VM_INSTRUCTION_ERROR) == VmxError.ENTRY_INVALID_HOST_STATE_FIELD


@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_pcide_needs_a_64_bit_host(l1: L1) -> None:
    """CR4.PCIDE is 0 in a 32-bit host."""
    pl1, seen = _launch(l1, {Field.HOST_CR4: 0x20 | Cr4.VMXE | Cr4.PCIDE})
    assert seen == FAILED_VALID
    assert _field(pl1, Field.VM_INSTRUCTION_ERROR) == VmxError.ENTRY_INVALID_HOST_STATE_FIELD


@pytest.mark.parametrize("what", ["host", "guest"])
@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_no_64_bits_from_protected_mode(l1: L1, what: str) -> None:
    """Outside IA-32e mode neither a 64-bit host nor a guest in IA-32e mode can be entered."""
    field, bit = {
        "host": (Field.VM_EXIT_CONTROLS, int(ExitCtl.HOST_ADDRESS_SPACE_SIZE)),
        "guest": (Field.VM_ENTRY_CONTROLS, int(EntryCtl.IA32E_MODE_GUEST)),
    }[what]
    usual = cached_baseline(l1.caps, l1.payload, L2Mode.PAE, None, 0)[field]
    pl1, seen = _launch(l1, {field: usual | bit})
    assert seen == FAILED_VALID
    assert _field(pl1, Field.VM_INSTRUCTION_ERROR) == VmxError.ENTRY_INVALID_HOST_STATE_FIELD


@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
@pytest.mark.sdm("VM Entries")
def test_late_failure_leaves_paging(l1: L1) -> None:
    """After an entry that the processor refused, PDPTEs and CR3 are those of L1."""
    page = l1.alloc()
    usual = cached_baseline(l1.caps, l1.payload, L2Mode.PAE, None, 0)
    pl1, seen = _launch(
        l1,
        {
            Field.CPU_BASED_VM_EXEC_CONTROL: usual[Field.CPU_BASED_VM_EXEC_CONTROL]
            | ProcCtl.USE_TPR_SHADOW,
            Field.VIRTUAL_APIC_PAGE_ADDR: page,
            Field.TPR_THRESHOLD: 1,  # above the TPR in the page
        },
    )
    assert seen == FAILED_VALID
    assert pl1.vcpu.get_sregs().cr3 == pl1.state[Field.GUEST_CR3]
    assert _field(pl1, Field.VM_INSTRUCTION_ERROR) == VmxError.ENTRY_INVALID_CONTROL_FIELD
