"""predict(): stages, allowed failures, the MSR-load area."""

from vmx_example import baseline, capabilities

from kvmnest.vmx import ExitReason, Field, IntrType, Msr, Rflags, VmxError, intr_info
from kvmnest.vmx.outcome import EntryFailure, VMfailValid
from kvmnest.vmx.rules import Stage, predict

F = Field
CAPS = capabilities()


def test_success() -> None:
    prediction = predict(baseline(CAPS), CAPS)
    assert prediction.may_succeed
    assert prediction.failures == ()
    assert prediction.stage is None
    assert str(prediction) == "no rule objects: VM entry succeeds"


def test_control_comes_before_guest() -> None:
    vmcs = baseline(CAPS) | {F.CR3_TARGET_COUNT: 9, F.GUEST_RFLAGS: 0}
    prediction = predict(vmcs, CAPS)
    assert prediction.stage is Stage.CONTROL
    assert prediction.failures == (VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD),)
    assert str(prediction) == (
        "VM-Execution Control Fields: the CR3-target count must not exceed 4 [CR3_TARGET_COUNT]"
    )


def test_control_and_host_are_in_any_order() -> None:
    prediction = predict(baseline(CAPS) | {F.CR3_TARGET_COUNT: 9, F.HOST_CS_SELECTOR: 0}, CAPS)
    assert prediction.must_fail
    assert prediction.allows(VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD))
    assert prediction.allows(VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD))
    assert not prediction.allows(EntryFailure(ExitReason.INVALID_GUEST_STATE, 0))


def test_guest_failures_by_qualification() -> None:
    prediction = predict(baseline(CAPS) | {F.GUEST_RFLAGS: 0, F.VMCS_LINK_POINTER: 8}, CAPS)
    assert prediction.failures == (
        EntryFailure(ExitReason.INVALID_GUEST_STATE, 0),
        EntryFailure(ExitReason.INVALID_GUEST_STATE, 4),
    )


def test_optional_rule_allows_both() -> None:
    vmcs = baseline(CAPS) | {
        F.GUEST_INTERRUPTIBILITY_INFO: 1,
        F.GUEST_RFLAGS: int(Rflags.IF | 2),
        F.VM_ENTRY_INTR_INFO_FIELD: intr_info(2, IntrType.NMI),
    }
    prediction = predict(vmcs, CAPS)
    assert prediction.may_succeed
    assert prediction.allows(EntryFailure(ExitReason.INVALID_GUEST_STATE, 3))


def test_msr_load_area() -> None:
    def entry(index: int, value: int = 0, reserved: int = 0) -> bytes:
        return b"".join(n.to_bytes(4, "little") for n in (index, reserved)) + value.to_bytes(
            8, "little"
        )

    vmcs = baseline(CAPS) | {F.VM_ENTRY_MSR_LOAD_COUNT: 2, F.VM_ENTRY_MSR_LOAD_ADDR: 0x6000}
    for bad in (
        entry(Msr.FS_BASE),
        entry(Msr.X2APIC_TPR),
        entry(Msr.SMBASE),
        entry(Msr.STAR, reserved=1),
    ):
        area = entry(Msr.STAR, 5) + bad
        prediction = predict(vmcs, CAPS, lambda gpa, size, area=area: area[:size])
        assert prediction.failures == (EntryFailure(ExitReason.MSR_LOAD_FAIL, 2),)
    good = entry(Msr.STAR, 5) * 2
    assert predict(vmcs, CAPS, lambda gpa, size: good).may_succeed
    assert predict(vmcs, CAPS).may_succeed
