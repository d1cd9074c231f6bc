"""Capabilities: clamp, missing bits, existing fields, decode."""

import pytest
from vmx_example import MSRS, capabilities

from kvmnest.vmx import (
    BasicCap,
    Capabilities,
    CpuFeatures,
    Cr0,
    Cr4,
    Efer,
    EntryCtl,
    EptVpidCap,
    ExitCtl,
    Field,
    Misc,
    Msr,
    PinCtl,
    Proc2Ctl,
    Proc3Ctl,
    ProcCtl,
    VmFunc,
    capdecode,
)
from kvmnest.vmx.field_conditions import CONDITIONS


def test_basic_and_misc_fields() -> None:
    caps = capabilities()
    assert caps.basic.revision_id == 0x11E57ED0
    assert caps.basic.region_size == 4096
    assert caps.basic.memory_type == 6
    assert caps.basic.true_controls
    assert caps.basic.ins_outs_info
    assert not caps.basic.dual_monitor
    assert not caps.basic.physical_32bit
    assert not caps.basic.error_code_optional
    assert caps.misc.preemption_timer_rate == 5
    assert caps.misc.msr_list_max == 512
    assert caps.misc.cr3_targets == 4
    assert [s.name for s in sorted(caps.misc.activity_states)] == ["ACTIVE", "HLT", "WAIT_FOR_SIPI"]
    assert caps.misc.vmwrite_any_field
    assert caps.misc.zero_length_injection
    assert caps.misc.save_efer_lma
    assert caps.vmcs_enum_max_index == 23


def test_clamp_obeys_must_and_may() -> None:
    caps = capabilities()
    value = caps.clamp(ProcCtl.HLT_EXITING | ProcCtl.ACTIVATE_TERTIARY_CONTROLS)
    assert isinstance(value, ProcCtl)
    assert ProcCtl.HLT_EXITING in value
    assert ProcCtl.ACTIVATE_TERTIARY_CONTROLS not in value
    assert value & 0xFFFFFFFF & caps.allowed0(ProcCtl) == caps.allowed0(ProcCtl)
    assert caps.clamp(PinCtl(0)) == 0x16


def test_true_msr_is_preferred() -> None:
    caps = capabilities()
    assert caps.source(ProcCtl) is Msr.IA32_VMX_TRUE_PROCBASED_CTLS
    assert ProcCtl.CR3_LOAD_EXITING not in caps.allowed0(ProcCtl)
    old = Capabilities.from_msrs({**MSRS, Msr.IA32_VMX_BASIC: 0x00D8_1000_11E5_7ED0 & ~(1 << 55)})
    assert old.source(ProcCtl) is Msr.IA32_VMX_PROCBASED_CTLS
    assert ProcCtl.CR3_LOAD_EXITING in old.allowed0(ProcCtl)


def test_missing_names_bit_and_msr() -> None:
    caps = capabilities(clear={Msr.IA32_VMX_TRUE_PROCBASED_CTLS: ProcCtl.MONITOR_TRAP_FLAG << 32})
    assert caps.missing(ProcCtl.MONITOR_TRAP_FLAG | ProcCtl.HLT_EXITING, Proc2Ctl.ENABLE_EPT) == [
        "ProcCtl.MONITOR_TRAP_FLAG: IA32_VMX_TRUE_PROCBASED_CTLS allows only 0"
    ]
    assert not caps.supports(ProcCtl.MONITOR_TRAP_FLAG)
    assert caps.supports(Cr4.PAE)
    assert caps.missing(Cr4.FRED) == ["Cr4.FRED: IA32_VMX_CR4_FIXED1 allows only 0"]
    assert caps.missing(Proc3Ctl.ENABLE_HLAT) == [
        "Proc3Ctl.ENABLE_HLAT: IA32_VMX_PROCBASED_CTLS3 allows only 0"
    ]
    assert caps.supports(EptVpidCap.EXECUTE_ONLY)
    assert caps.supports(VmFunc.EPTP_SWITCHING)
    assert caps.supports(Misc.VMWRITE_ANY_FIELD)
    assert caps.supports(BasicCap.TRUE_CONTROLS)
    with pytest.raises(TypeError, match="Efer"):
        caps.supports(Efer.LME)


def test_fixed_bits() -> None:
    caps = capabilities()
    assert caps.allowed0(Cr0) == Cr0.PE | Cr0.NE | Cr0.PG
    assert caps.clamp(Cr4(0)) == Cr4.VMXE


def test_no_vmx() -> None:
    with pytest.raises(ValueError, match="480H"):
        Capabilities.from_msrs({0x481: 1})


def test_minimal_processor_without_secondary_controls() -> None:
    caps = Capabilities.from_msrs({k: v for k, v in MSRS.items() if k <= 0x48A})
    assert not caps.supports(Proc2Ctl.ENABLE_EPT)
    assert caps.clamp(Proc2Ctl.ENABLE_EPT) == 0
    assert not caps.field_exists(Field.EPT_POINTER)
    assert caps.ept_vpid == 0


def test_field_exists_by_condition() -> None:
    caps = capabilities()
    assert caps.field_exists(Field.EPT_POINTER)
    assert caps.field_exists(Field.GUEST_RIP)
    assert caps.field_exists(Field.CR3_TARGET_VALUE3)
    assert not caps.field_exists(Field.GUEST_IA32_FRED_RSP1)
    assert not caps.field_exists(Field.SHARED_EPT_POINTER)
    none = capabilities(clear={Msr.IA32_VMX_MISC: 4 << 16})
    assert not none.field_exists(Field.CR3_TARGET_VALUE0)
    for clear, entry in ((EntryCtl.LOAD_PAT, True), (0, False)):
        one = capabilities(
            clear={
                Msr.IA32_VMX_TRUE_ENTRY_CTLS: clear << 32,
                Msr.IA32_VMX_TRUE_EXIT_CTLS: (0 if entry else ExitCtl.SAVE_PAT) << 32,
            }
        )
        assert one.field_exists(Field.GUEST_IA32_PAT), "either control is enough"


def test_conditions_only_speak_of_optional_flags() -> None:
    assert all(isinstance(field, Field) for field in CONDITIONS)
    always = {Field.GUEST_CR0, Field.VMCS_LINK_POINTER, Field.VM_EXIT_REASON, Field.TSC_OFFSET}
    assert not always & set(CONDITIONS)


def test_decode_covers_every_msr() -> None:
    caps = capabilities()
    lines = capdecode.decode(caps)
    assert {msr for msr, _, _ in lines} >= {Msr(index) for index in MSRS if index != 0x486}
    as_dict = {(msr, name): value for msr, name, value in lines}
    assert as_dict[Msr.IA32_VMX_TRUE_PROCBASED_CTLS, "HLT_EXITING"] == "0 or 1"
    assert as_dict[Msr.IA32_VMX_TRUE_PROCBASED_CTLS, "bit 1"] == "must be 1"
    assert as_dict[Msr.IA32_VMX_PROCBASED_CTLS, "CR3_LOAD_EXITING"] == "must be 1"
    assert as_dict[Msr.IA32_VMX_PROCBASED_CTLS2, "ENABLE_PCONFIG"] == "must be 0"
    assert as_dict[Msr.IA32_VMX_CR4_FIXED0, "VMXE"] == "must be 1"
    assert as_dict[Msr.IA32_VMX_MISC, "preemption timer rate"] == "TSC bit 5"


def test_cpu_from_cpuid() -> None:
    cpu = CpuFeatures.from_cpuid(
        {
            (1, 0): (0, 0, 1 << 15, 0),
            (7, 0): (0, 1 << 11, 1 << 16, 0),
            (0xA, 0): (0x0804_0402, 0, 0, 3),
            (0x80000001, 0): (0, 0, 0, 1 << 29 | 1 << 20 | 1 << 11),
            (0x80000008, 0): (46 | 57 << 8, 0, 0, 0),
        }
    )
    assert (cpu.physical_bits, cpu.linear_bits) == (46, 57)
    assert cpu.efer_valid == 0xD01
    assert cpu.perf_global_ctrl_valid == 0xF | 7 << 32
    assert cpu.rtm
    assert not cpu.bus_lock_trap
    assert cpu.debugctl_valid == 0x1FC3 | 1 << 14 | 1 << 15
    empty = CpuFeatures.from_cpuid({})
    assert (empty.physical_bits, empty.linear_bits, empty.efer_valid) == (36, 48, 0)
