"""The VMCS region: size, revision identifier, write-back, and what moves with it."""

import pytest

from kvmnest.l1 import L1
from kvmnest.vmx import ExitReason, Field, VmxError
from kvmnest.vmx.outcome import Exit, Succeed, VMfailValid

pytestmark = [pytest.mark.series(5), pytest.mark.sdm("Format of the VMCS Region")]


@pytest.mark.sdm("Software Use of the VMCS and Related Structures")
def test_region_size_and_memory_type(l1: L1) -> None:
    """IA32_VMX_BASIC: 1 to 4096 bytes, write-back, a revision identifier that is not 0."""
    basic = l1.caps.basic
    assert 0 < basic.region_size <= 4096
    assert basic.memory_type == 6
    assert basic.revision_id >> 31 == 0
    assert basic.revision_id != 0


def test_vmclear_keeps_the_revision_identifier(l1: L1) -> None:
    """VMCLEAR writes the VMCS data back; the first four bytes stay as software wrote them."""
    vmcs = l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.vmclear(vmcs.address) == Succeed()
    assert l1.read_int(vmcs.address, 4) == l1.caps.basic.revision_id


def test_vmcs_uses_no_more_than_its_region(l1: L1) -> None:
    """Nothing beyond the region that IA32_VMX_BASIC describes is written."""
    l1.enter_vmx()
    pages = l1.alloc(3)
    size = l1.caps.basic.region_size
    l1.write(pages, b"\xa5" * 4096)
    l1.write(pages + 4096 + size, b"\xa5" * (8192 - size))
    l1.load_vmcs(pages + 4096)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.vmclear(pages + 4096) == Succeed()
    assert l1.read(pages, 4096) == b"\xa5" * 4096
    assert l1.read(pages + 4096 + size, 8192 - size) == b"\xa5" * (8192 - size)


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_vmcs_moves_with_its_memory(l1: L1) -> None:
    """After VMCLEAR the region's bytes are the VMCS: a copy of them is the same VMCS."""
    vmcs = l1.launchable()
    vmcs[Field.GUEST_RSP] = 0x1238
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.vmclear(vmcs.address) == Succeed()
    copy = l1.sym("vmcs_b")
    l1.write(copy, l1.read(vmcs.address, 4096))
    assert l1.vmptrld(copy) == Succeed()
    assert l1.vmread(Field.GUEST_RSP) == Succeed(0x1238)
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


def test_any_page_of_memory_can_hold_a_vmcs(l1: L1) -> None:
    """Regions anywhere in RAM work alike."""
    l1.enter_vmx()
    for _ in range(4):
        vmcs = l1.load_vmcs(l1.alloc())
        assert l1.vmptrst() == Succeed(vmcs.address)
        assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
