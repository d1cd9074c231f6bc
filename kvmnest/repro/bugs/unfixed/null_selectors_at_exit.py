"""A VM exit makes segments usable whose selectors are null."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="FS is usable",
    correct="FS is unusable",
    fix=tuple(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "load_vmcs12_host_state",
            "expression": f"seg.selector = vmcs12->host_{name}_selector;",
            "replacement": f"""
                seg.selector = vmcs12->host_{name}_selector;
                seg.unusable = !seg.selector;""",
        }
        for name in ("ds", "es", "ss", "fs", "gs")
    ),
)


@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_null_selector_of_fs(l1: L1) -> None:
    """A segment is unusable if its selector is loaded with zero."""
    vmcs = l1.launchable()
    vmcs[Field.HOST_FS_SELECTOR] = 0
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    fs = l1.vcpu.get_sregs().fs
    assert (fs.selector, fs.unusable) == (0, 1)
