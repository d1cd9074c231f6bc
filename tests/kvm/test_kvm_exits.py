"""The exit classes and the decoders, fed with a struct kvm_run; no KVM needed."""

import pytest

from kvmnest.kvm import exits
from kvmnest.kvm.exits import DebugExit, Exit, HltExit, InternalErrorExit, IoExit, ShutdownExit
from kvmnest.kvm.native import CData, ffi


def decode(reason: int, behind: bytes = b"", **fields: object) -> Exit:
    """Decode an exit; ``behind`` follows struct kvm_run in the mapping."""
    run = ffi.new("struct kvm_run *")
    run.exit_reason = reason
    for path, value in fields.items():
        *parents, last = path.split("__")
        target: CData = run
        for name in parents:
            target = getattr(target, name)
        setattr(target, last, value)
    return exits.DECODERS[reason](run, bytes(ffi.buffer(run)) + behind)


def test_values_compare_by_type_and_fields() -> None:
    assert HltExit() == HltExit()
    assert HltExit() != ShutdownExit()
    one = IoExit(exits.IO_OUT, 1, 0x10, 1, b"x")
    same = IoExit(direction=exits.IO_OUT, size=1, port=0x10, count=1, data=b"x")
    assert one == same
    assert hash(one) == hash(same)
    assert one != IoExit(exits.IO_OUT, 1, 0x11, 1, b"x")
    assert {HltExit(): 1}[HltExit()] == 1


def test_values_cannot_change() -> None:
    value = DebugExit(1, 2, 3, 4)
    with pytest.raises(AttributeError, match="DebugExit cannot be changed"):
        value.pc = 5  # type: ignore[misc]
    with pytest.raises(AttributeError, match="DebugExit cannot be changed"):
        del value.pc
    assert value.pc == 2


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2, 3), {}),
        ((1, 2, 3, 4, 5), {}),
        ((1, 2, 3, 4), {"pc": 2}),
        ((1, 2, 3), {"nonsense": 4}),
        ((), {"exception": 1, "pc": 2, "dr6": 3}),
    ],
)
def test_constructor_wants_exactly_the_fields(
    args: tuple[int, ...], kwargs: dict[str, int]
) -> None:
    with pytest.raises(TypeError, match="DebugExit takes"):
        DebugExit(*args, **kwargs)


def test_repr_and_match() -> None:
    value = IoExit(exits.IO_OUT, 2, 0x3F8, 1, b"ab")
    assert repr(value) == "IoExit(direction=1, size=2, port=0x3f8, count=1, data=b'ab')"
    match value:
        case IoExit(direction, 2, port):
            assert (direction, port) == (exits.IO_OUT, 0x3F8)
        case _:
            pytest.fail("no match")


def test_io_decodes_where_data_offset_points() -> None:
    behind = bytes(100) + b"\x01\x02\x03\x04" + bytes(100)
    fields: dict[str, object] = {
        "io__direction": exits.IO_OUT,
        "io__size": 2,
        "io__port": 0x80,
        "io__count": 2,
        "io__data_offset": ffi.sizeof("struct kvm_run") + 100,
    }
    assert decode(2, behind, **fields) == IoExit(exits.IO_OUT, 2, 0x80, 2, b"\1\2\3\4")
    fields["io__direction"] = exits.IO_IN
    assert decode(2, behind, **fields) == IoExit(exits.IO_IN, 2, 0x80, 2, b"")
    assert not decode(2, behind, **fields).is_out  # type: ignore[attr-defined]


def test_internal_error_names_the_failed_instruction() -> None:
    words = (1, int.from_bytes(b"\x03\x0f\x01\xca" + bytes(4), "little"), 0)
    value = decode(17, internal__suberror=1, internal__ndata=3, internal__data=words)
    assert value == InternalErrorExit(1, words)
    assert value.instruction == b"\x0f\x01\xca"  # type: ignore[attr-defined]
    assert value.text == "emulation failed"  # type: ignore[attr-defined]


def test_internal_error_without_instruction_bytes() -> None:
    assert InternalErrorExit(1, (0, 5, 6)).instruction == b""
    assert InternalErrorExit(1, (1,)).instruction == b""
    assert InternalErrorExit(3, (1, 3, 0)).instruction == b""
    assert InternalErrorExit(3, ()).text == "unexpected exit while an event was delivered"
    assert InternalErrorExit(77, ()).text == "suberror 77"


@pytest.mark.parametrize(
    ("reason", "fields", "expected"),
    [
        (0, {"hw__hardware_exit_reason": 1 << 40}, exits.UnknownExit(1 << 40)),
        (1, {"ex__exception": 14, "ex__error_code": 2}, exits.ExceptionExit(14, 2)),
        (
            3,
            {"hypercall__nr": 12, "hypercall__args": (1, 2, 3, 4, 5, 6), "hypercall__longmode": 1},
            exits.HypercallExit(12, (1, 2, 3, 4, 5, 6), 1),
        ),
        (
            6,
            {"mmio__phys_addr": 9, "mmio__len": 2, "mmio__is_write": 1, "mmio__data": b"abcdefgh"},
            exits.MmioExit(9, 2, True, b"ab"),
        ),
        (
            6,
            {"mmio__phys_addr": 9, "mmio__len": 4, "mmio__data": b"stale..."},
            exits.MmioExit(9, 4, False, b""),
        ),
        (
            9,
            {"fail_entry__hardware_entry_failure_reason": 0x80000021, "fail_entry__cpu": 3},
            exits.FailEntryExit(0x80000021, 3),
        ),
        (12, {"tpr_access__rip": 5, "tpr_access__is_write": 1}, exits.TprAccessExit(5, True)),
        (
            24,
            {"system_event__type": 3, "system_event__ndata": 1, "system_event__data": (7, 8)},
            exits.SystemEventExit(3, (7,)),
        ),
        (26, {"eoi__vector": 0x40}, exits.EoiExit(0x40)),
        (
            27,
            {
                "hyperv__type": 1,
                "hyperv__u__synic__msr": 1,
                "hyperv__u__synic__control": 2,
                "hyperv__u__synic__evt_page": 3,
                "hyperv__u__synic__msg_page": 4,
            },
            exits.HypervExit(1, (1, 2, 3, 4)),
        ),
        (
            27,
            {"hyperv__type": 2, "hyperv__u__hcall__input": 1, "hyperv__u__hcall__params": (5, 6)},
            exits.HypervExit(2, (1, 5, 6)),
        ),
        (
            27,
            {"hyperv__type": 3, "hyperv__u__syndbg__msr": 8, "hyperv__u__syndbg__pending_page": 9},
            exits.HypervExit(3, (8, 0, 0, 0, 0, 9)),
        ),
        (
            29,
            {"msr__reason": 2, "msr__index": 0x480},
            exits.RdmsrExit(exits.MSR_REASON_UNKNOWN, 0x480),
        ),
        (
            30,
            {"msr__reason": 4, "msr__index": 0x480, "msr__data": 1 << 63},
            exits.WrmsrExit(exits.MSR_REASON_FILTER, 0x480, 1 << 63),
        ),
        (
            34,
            {
                "xen__u__hcall__longmode": 1,
                "xen__u__hcall__cpl": 3,
                "xen__u__hcall__input": 17,
                "xen__u__hcall__params": (1, 2, 3, 4, 5, 6),
            },
            exits.XenExit(1, 3, 17, (1, 2, 3, 4, 5, 6)),
        ),
        (37, {"notify__flags": 1}, exits.NotifyExit(1)),
        (
            39,
            {"memory_fault__flags": 8, "memory_fault__gpa": 0x1000, "memory_fault__size": 4096},
            exits.MemoryFaultExit(8, 0x1000, 4096),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exit) else "",
)
def test_decoding(reason: int, fields: dict[str, object], expected: Exit) -> None:
    assert decode(reason, **fields) == expected
