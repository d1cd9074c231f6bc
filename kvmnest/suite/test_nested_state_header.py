"""KVM_SET_NESTED_STATE reads its header with care: each rule of it, broken alone.

KVM's API documentation, KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE: flags, format and size, the
pointers of the VMXON region and of the current VMCS (all ones: none), and the state of SMM.
"""

from __future__ import annotations

import errno
import struct

import pytest

from kvmnest.kvm import Cap, Kvm, KvmError, Vcpu, ffi, ioctls
from kvmnest.l1 import L1
from kvmnest.suite.support.cpuid import WithoutVmx
from kvmnest.suite.support.entries import address_bits
from kvmnest.vmx.outcome import Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
    pytest.mark.needs(Cap.NESTED_STATE),
]

NONE = 0xFFFFFFFFFFFFFFFF
_HEADER, _VMCS = 128, 4096
GUEST_MODE, RUN_PENDING, ENLIGHTENED, MTF_PENDING = 1, 2, 4, 8
#: Flags of no architecture.
UNKNOWN = [*range(4, 8), *range(9, 16)]
SMM_GUEST_MODE, SMM_VMXON = 1, 2


def _state(
    *,
    flags: int = 0,
    kind: int = 0,
    size: int | None = None,
    vmxon: int = NONE,
    vmcs: int = NONE,
    smm: int = 0,
    vmx_flags: int = 0,
    body: bytes = b"",
) -> bytes:
    """A nested state; ``size`` is what it announces, else its real size."""
    announced = _HEADER + len(body) if size is None else size
    header = struct.pack("<HHIQQHHIQ", flags, kind, announced, vmxon, vmcs, smm, 0, vmx_flags, 0)
    return header.ljust(_HEADER, b"\0") + body


def _set(vcpu: Vcpu, state: bytes | None) -> int:
    """KVM_SET_NESTED_STATE; its errno, 0 if it succeeds."""
    row = ioctls.SET_NESTED_STATE
    try:
        vcpu.ioctl(row, ffi.NULL if state is None else ffi.from_buffer(row.pointer, state))
    except KvmError as error:
        return error.errno or errno.EIO
    return 0


def _pointers(vcpu: Vcpu) -> tuple[int, int, int]:
    """Flags, VMXON pointer and VMCS pointer as KVM_GET_NESTED_STATE gives them."""
    flags, vmxon, vmcs = struct.unpack_from("<H6xQQ", vcpu.get_nested_state())
    return flags, vmxon, vmcs


def _still_off(l1: L1) -> None:
    assert _pointers(l1.vcpu) == (0, NONE, NONE)
    l1.enter_vmx()
    assert l1.vmxoff() == Succeed()


def test_address_that_cannot_be_read(l1: L1) -> None:
    """A pointer to no memory: EFAULT."""
    assert _set(l1.vcpu, None) == errno.EFAULT
    _still_off(l1)


@pytest.mark.parametrize("size", [0, 1, 127])
def test_size_below_the_header(l1: L1, size: int) -> None:
    """An announced size smaller than the header: EINVAL."""
    assert _set(l1.vcpu, _state(size=size)) == errno.EINVAL
    assert _set(l1.vcpu, _state(size=size, vmxon=l1.sym("vmxon_region"))) == errno.EINVAL
    _still_off(l1)


def test_flags(l1: L1) -> None:
    """Unknown flags, and flags of an L2 where there is none: EINVAL."""
    vmxon = l1.sym("vmxon_region")
    for bit in UNKNOWN:
        for pointer in (NONE, vmxon):
            assert _set(l1.vcpu, _state(flags=1 << bit, vmxon=pointer)) == errno.EINVAL, bit
    for flags in (GUEST_MODE, RUN_PENDING, RUN_PENDING | GUEST_MODE, MTF_PENDING, 0xF):
        assert _set(l1.vcpu, _state(flags=flags)) == errno.EINVAL, flags
    for flags in (GUEST_MODE, RUN_PENDING, RUN_PENDING | GUEST_MODE):
        # VMX operation without a current VMCS has no L2 either.
        assert _set(l1.vcpu, _state(flags=flags, vmxon=vmxon)) == errno.EINVAL, flags
    _still_off_after_root(l1)


def _still_off_after_root(l1: L1) -> None:
    """A state that is refused late may have put the vCPU into VMX root operation."""
    assert _set(l1.vcpu, _state()) == 0
    _still_off(l1)


def test_other_formats(l1: L1) -> None:
    """A format that is not VMX's: EINVAL."""
    for kind in (1, 2, 0x8000, 0xFFFF):
        for vmxon in (NONE, l1.sym("vmxon_region")):
            assert _set(l1.vcpu, _state(kind=kind, vmxon=vmxon)) == errno.EINVAL, kind
    _still_off(l1)


def test_flags_of_vmx(l1: L1) -> None:
    """Bit 0 of the VMX flags says that the timer has a deadline; the others are reserved."""
    vmxon = l1.sym("vmxon_region")
    for bit in range(1, 32):
        assert _set(l1.vcpu, _state(vmx_flags=1 << bit, vmxon=vmxon)) == errno.EINVAL, bit
    _still_off(l1)


def test_flags_of_smm(l1: L1) -> None:
    """Outside SMM, or outside VMX operation, no SMM flag may be set; bits 15:2 never."""
    vmxon, vmcs = l1.sym("vmxon_region"), l1.prepare_region(l1.sym("vmcs_a"))
    body = l1.read(vmcs, _VMCS)
    for smm in (SMM_GUEST_MODE, SMM_VMXON, SMM_GUEST_MODE | SMM_VMXON):
        assert _set(l1.vcpu, _state(smm=smm)) == errno.EINVAL, smm
        assert _set(l1.vcpu, _state(smm=smm, vmxon=vmxon)) == errno.EINVAL, smm
        in_l2 = _state(flags=GUEST_MODE, smm=smm, vmxon=vmxon, vmcs=vmcs, body=body)
        assert _set(l1.vcpu, in_l2) == errno.EINVAL, smm
    for bit in range(2, 16):
        assert _set(l1.vcpu, _state(smm=1 << bit, vmxon=vmxon)) == errno.EINVAL, bit
    _still_off(l1)


def test_enlightened_without_the_capability(l1: L1) -> None:
    """The flag of an enlightened VMCS: EINVAL before KVM_CAP_HYPERV_ENLIGHTENED_VMCS is enabled."""
    assert _set(l1.vcpu, _state(flags=ENLIGHTENED)) == errno.EINVAL
    vmxon = l1.sym("vmxon_region")
    assert _set(l1.vcpu, _state(flags=ENLIGHTENED, vmxon=vmxon)) == errno.EINVAL
    _still_off(l1)


@pytest.mark.needs(Cap.HYPERV_ENLIGHTENED_VMCS)
def test_enlightened_with_the_capability(l1: L1) -> None:
    """With it the flag is accepted outside VMX operation, without effect, not with a VMCS."""
    versions = ffi.new("uint16_t *")
    l1.vcpu.enable_cap(Cap.HYPERV_ENLIGHTENED_VMCS, int(ffi.cast("uintptr_t", versions)))
    assert _set(l1.vcpu, _state(flags=ENLIGHTENED)) == 0
    assert _pointers(l1.vcpu) == (0, NONE, NONE)
    bad = _state(flags=ENLIGHTENED, vmxon=l1.sym("vmxon_region"))
    assert _set(l1.vcpu, bad) == errno.EINVAL
    _still_off_after_root(l1)


@pytest.mark.parametrize("which", ["vmxon", "vmcs"])
def test_pointers(l1: L1, which: str) -> None:
    """A region that is not aligned or beyond the physical-address width: EINVAL."""
    regions = {"vmxon": l1.sym("vmxon_region"), "vmcs": l1.prepare_region(l1.sym("vmcs_a"))}
    body = l1.read(regions["vmcs"], _VMCS)
    good = regions[which]
    physical, _ = address_bits(l1)
    for bit in (*range(12), *range(physical, 63)):
        regions[which] = good | 1 << bit
        assert _set(l1.vcpu, _state(**regions, body=body)) == errno.EINVAL, bit
    _still_off_after_root(l1)


def test_combinations_of_pointers(l1: L1) -> None:
    """No VMCS without VMX operation, nor in the VMXON region, nor without its content."""
    vmxon, vmcs = l1.sym("vmxon_region"), l1.prepare_region(l1.sym("vmcs_a"))
    body = l1.read(vmcs, _VMCS)
    for bad in (
        _state(vmcs=vmcs, body=body),
        _state(vmcs=vmcs),
        _state(vmxon=vmxon, vmcs=vmxon, body=body),
        _state(vmxon=vmxon, vmcs=vmcs),
        _state(vmxon=vmxon, vmcs=vmcs, body=body[:256]),
    ):
        assert _set(l1.vcpu, bad) == errno.EINVAL, bad[:32].hex()
    _still_off_after_root(l1)


def test_accepted_states(l1: L1) -> None:
    """Outside VMX operation; in root operation without a VMCS, and with one whose fields are junk.

    The content of a VMCS matters at VM entry, which its launch state and revision allow.
    """
    vmxon, vmcs = l1.sym("vmxon_region"), l1.prepare_region(l1.sym("vmcs_a"))
    assert _set(l1.vcpu, _state()) == 0
    assert _pointers(l1.vcpu) == (0, NONE, NONE)
    assert _set(l1.vcpu, _state(vmxon=vmxon)) == 0
    assert _pointers(l1.vcpu) == (0, vmxon, NONE)
    assert l1.vmptrst() == Succeed(NONE)
    junk = l1.read(vmcs, 8) + b"\x5a" * (_VMCS - 8)
    assert _set(l1.vcpu, _state(vmxon=vmxon, vmcs=vmcs, body=junk)) == 0
    assert _pointers(l1.vcpu) == (0, vmxon, vmcs)
    assert l1.vmptrst() == Succeed(vmcs)
    # Another revision is none that KVM can have saved.
    other = (l1.read_int(vmcs, 4) ^ 1).to_bytes(4, "little")
    bad = _state(vmxon=vmxon, vmcs=vmcs, body=other + junk[4:])
    assert _set(l1.vcpu, bad) == errno.EINVAL
    _still_off_after_root(l1)


def test_state_with_room_behind_it(l1: L1) -> None:
    """A header that announces more than KVM needs is accepted: a newer KVM may have saved it."""
    vmxon = l1.sym("vmxon_region")
    assert _set(l1.vcpu, _state(vmxon=vmxon, size=200, body=bytes(72))) == 0
    assert _pointers(l1.vcpu) == (0, vmxon, NONE)
    assert l1.vmxoff() == Succeed()


def test_guest_without_vmx(kvm: Kvm) -> None:
    """Where CPUID shows no VMX only the state outside VMX operation is accepted."""
    with WithoutVmx(kvm) as l1:
        vmxon = l1.sym("vmxon_region")
        assert _set(l1.vcpu, _state(vmxon=vmxon)) == errno.EINVAL
        assert _set(l1.vcpu, _state(vmxon=vmxon, vmcs=l1.sym("vmcs_a"))) == errno.EINVAL
        assert _set(l1.vcpu, _state(flags=ENLIGHTENED)) == errno.EINVAL
        assert _set(l1.vcpu, _state(flags=GUEST_MODE)) == errno.EINVAL
        assert _set(l1.vcpu, _state()) == 0
        assert _pointers(l1.vcpu) == (0, NONE, NONE)
