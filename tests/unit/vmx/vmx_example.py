"""Capability MSRs of an ordinary processor with EPT, as KVM shows them to L1."""

from collections.abc import Mapping

from kvmnest.vmx import Capabilities, Cpu

MSRS: dict[int, int] = {
    0x480: 0x00D8_1000_11E5_7ED0,
    0x481: 0x0000_00FF_0000_0016,
    0x482: 0xFFF9_FFFE_0401_E172,
    0x483: 0x003F_FFFF_0003_6DFF,
    0x484: 0x0000_F3FF_0000_11FF,
    0x485: 0x6004_0165,
    0x486: 0x8000_0021,
    0x487: 0xFFFF_FFFF,
    0x488: 0x2000,
    0x489: 0x0077_2FFF,
    0x48A: 0x2E,
    0x48B: 0x0217_7FFF_0000_0000,
    0x48C: 0x0F01_0673_4141,
    0x48D: 0x0000_00FF_0000_0016,
    0x48E: 0xFFF9_FFFE_0400_6172,
    0x48F: 0x007F_FFFF_0003_6DFB,
    0x490: 0x0000_F3FF_0000_11FB,
    0x491: 1,
}


def capabilities(
    set: Mapping[int, int] | None = None,
    clear: Mapping[int, int] | None = None,
    cpu: Cpu | None = None,
) -> Capabilities:
    """The example's capabilities with some MSR bits set and cleared."""
    msrs = dict(MSRS)
    for index, bits in (set or {}).items():
        msrs[index] = msrs.get(index, 0) | bits
    for index, bits in (clear or {}).items():
        msrs[index] = msrs.get(index, 0) & ~bits
    return Capabilities.from_msrs(msrs, cpu)
