"""Rules about the host-state area."""

import pytest
from vmx_example import baseline, capabilities

from kvmnest.vmx import CpuFeatures, Cr4, Efer, EntryCtl, ExitCtl, Field
from kvmnest.vmx.rules import EntryContext, Stage, check

F = Field
CAPS = capabilities(cpu=CpuFeatures(physical_bits=46))
EXIT = F.VM_EXIT_CONTROLS
NON_CANONICAL = 1 << 47

# Values are set, except for a tuple: (bits to set, bits to clear).
ROWS: list[tuple[dict[Field, int | tuple[int, int]], str]] = [
    ({F.HOST_CR0: (0, 1 << 5)}, "CR0: NE must be 1"),
    ({F.HOST_CR0: (1 << 32, 0)}, "CR0: 0x100000000 must be 0"),
    ({F.HOST_CR4: (0, Cr4.VMXE)}, "CR4: VMXE must be 1"),
    ({F.HOST_CR4: (Cr4.LA57, 0)}, "CR4: LA57 must be 0"),
    ({F.HOST_CR3: 1 << 46}, "CR3 must not exceed the physical-address width"),
    ({F.HOST_IA32_SYSENTER_ESP: NON_CANONICAL}, "the address must be canonical"),
    ({F.HOST_IA32_SYSENTER_EIP: NON_CANONICAL}, "the address must be canonical"),
    (
        {EXIT: (ExitCtl.LOAD_PAT, 0), F.HOST_IA32_PAT: 2 << 56},
        "each byte of IA32_PAT must be a memory type",
    ),
    ({F.HOST_IA32_EFER: Efer.LMA}, "IA32_EFER.LME must equal HOST_ADDRESS_SPACE_SIZE"),
    ({F.HOST_IA32_EFER: Efer.LME}, "IA32_EFER.LMA must equal HOST_ADDRESS_SPACE_SIZE"),
    ({F.HOST_IA32_EFER: 0x502}, "IA32_EFER must not set reserved bits"),
    ({F.HOST_DS_SELECTOR: 3}, "RPL and TI of the selector must be 0"),
    ({F.HOST_GS_SELECTOR: 4}, "RPL and TI of the selector must be 0"),
    ({F.HOST_CS_SELECTOR: 0}, "the selector must not be 0"),
    ({F.HOST_TR_SELECTOR: 0}, "the selector must not be 0"),
    ({F.HOST_FS_BASE: NON_CANONICAL}, "the base must be canonical"),
    ({F.HOST_GDTR_BASE: NON_CANONICAL}, "the base must be canonical"),
    ({F.HOST_TR_BASE: 2**63}, "the base must be canonical"),
    ({F.HOST_CR4: (0, Cr4.PAE)}, "a 64-bit host needs CR4.PAE"),
    ({F.HOST_RIP: NON_CANONICAL}, "RIP of a 64-bit host must be canonical"),
]


def apply(vmcs: dict[Field, int], change: dict[Field, int | tuple[int, int]]) -> dict[Field, int]:
    vmcs = dict(vmcs)
    for field, value in change.items():
        if isinstance(value, tuple):
            vmcs[field] = vmcs.get(field, 0) & ~int(value[1]) | int(value[0])
        else:
            vmcs[field] = int(value)
    return vmcs


@pytest.mark.parametrize(("change", "text"), ROWS)
def test_one_host_rule(change: dict[Field, int | tuple[int, int]], text: str) -> None:
    found = check(apply(baseline(CAPS), change), CAPS)
    assert [violation.text for violation in found] == [text]
    assert found[0].stage is Stage.HOST
    assert set(found[0].fields) & set(change)


@pytest.mark.parametrize(
    "change",
    [
        {F.HOST_SS_SELECTOR: 0},
        {F.HOST_FS_BASE: 0xFFFF_8000_0000_0000},
        {F.HOST_CR0: (3 << 29, 0)},
        {F.HOST_IA32_PAT: 2},
        {EXIT: (0, ExitCtl.LOAD_EFER), F.HOST_IA32_EFER: 2},
        {EXIT: (ExitCtl.LOAD_PAT, 0), F.HOST_IA32_PAT: 0x0007040600070406},
    ],
)
def test_accepted(change: dict[Field, int | tuple[int, int]]) -> None:
    assert check(apply(baseline(CAPS), change), CAPS) == []


def test_32bit_host() -> None:
    legacy = EntryContext(long_mode=False)
    vmcs = apply(
        baseline(CAPS),
        {
            EXIT: (0, ExitCtl.HOST_ADDRESS_SPACE_SIZE),
            F.HOST_IA32_EFER: 0,
            F.HOST_SS_SELECTOR: 0,
            F.HOST_RIP: 1 << 32,
            F.HOST_CR4: (Cr4.PCIDE, 0),
        },
    )
    assert [v.text for v in check(vmcs, CAPS, context=legacy)] == [
        "SS must not be 0 for a 32-bit host",
        "IA32E_MODE_GUEST needs a VM entry from IA-32e mode",
        "IA32E_MODE_GUEST needs HOST_ADDRESS_SPACE_SIZE",
        "CR4.PCIDE must be 0 for a 32-bit host",
        "bits 63:32 of RIP must be 0 for a 32-bit host",
    ]
    assert "HOST_ADDRESS_SPACE_SIZE must equal IA32_EFER.LMA at VM entry" in [
        v.text for v in check(vmcs, CAPS)
    ]


def test_cet_state() -> None:
    caps = capabilities(set={0x48F: ExitCtl.LOAD_CET_STATE << 32, 0x489: Cr4.CET})
    vmcs = apply(
        baseline(caps),
        {
            EXIT: (ExitCtl.LOAD_CET_STATE, 0),
            F.HOST_S_CET: 0xC40,
            F.HOST_SSP: 2,
            F.HOST_INTR_SSP_TABLE: NON_CANONICAL,
            F.HOST_CR4: (Cr4.CET, 0),
        },
    )
    assert [v.text for v in check(vmcs, caps)] == [
        "CR4.CET needs CR0.WP",
        "bits 9:6 of IA32_S_CET must be 0",
        "bits 11:10 of IA32_S_CET must not both be 1",
        "the address must be canonical",
        "bits 1:0 of SSP must be 0",
    ]


def test_ia32e_guest_of_64bit_host_only() -> None:
    vmcs = apply(baseline(CAPS), {F.VM_ENTRY_CONTROLS: (0, EntryCtl.IA32E_MODE_GUEST)})
    assert not [v for v in check(vmcs, CAPS) if v.stage is Stage.HOST]
