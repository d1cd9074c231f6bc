"""Programs on the reference CPU: what is seen of each step."""

from kvmnest.fuzz.programs.replay import replay
from kvmnest.kvm import Kvm
from kvmnest.l1 import L1

START = [
    {"do": "region", "place": "vmxon_region", "revision": "good"},
    {"do": "address", "name": "vmxon", "place": "vmxon_region", "offset": 0},
    {"do": "region", "place": "vmcs_a", "revision": "good"},
    {"do": "address", "name": "vmclear", "place": "vmcs_a", "offset": 0},
    {"do": "address", "name": "vmptrld", "place": "vmcs_a", "offset": 0},
    {"do": "base", "mode": "LONG"},
]


def test_each_entry_is_seen(bare: Kvm) -> None:
    """CPUID exits, STI does not: the VMCALL behind it has its flag, its RIP, and the HLT's page."""
    # CPUID; HLT; STI, NOP; MOV BYTE [RDI], 7
    code = {"do": "code", "parts": ["0fa2", "f4", "fb90c60707"]}
    enter = {"do": "enter", "name": "vmlaunch", "regs": {}, "most": 8}
    with L1(bare) as l1:
        data = l1.sym("l2_data")
        seen = replay(l1, [*START, code, {**enter, "regs": {"rdi": data}}])
        start = l1.sym("l2_code")
    # Between entries there is what L1 writes.
    cpuid, _, halt, _, last = seen[-1]
    assert [each["end"] for each in (cpuid, halt, last)] == [["Exit", n] for n in (10, 12, 18)]
    assert [each["guest.GUEST_RIP"] - start for each in (cpuid, halt, last)] == [0, 2, 8]
    assert (halt["guest.GUEST_RFLAGS"], last["guest.GUEST_RFLAGS"]) == (0x2, 0x202)
    assert halt["memory.l2_data"] != last["memory.l2_data"]
    assert last["regs.rdi"] == data


def test_the_end_of_l1_is_the_last_thing_seen(bare: Kvm) -> None:
    """A host-state area that is nowhere: the program ends there."""
    lost = {"do": "fields", "fields": {"HOST_CR3": 0x200000, "HOST_IDTR_BASE": 0x300000}}
    enter = {"do": "enter", "name": "vmlaunch", "regs": {}, "most": 1}
    with L1(bare) as l1:
        seen = replay(l1, [*START, lost, enter, {"do": "alone", "name": "vmxoff"}])
    assert len(seen) == len(START) + 2
    assert seen[-1][-1]["end"] == ["lost", "triple fault"]


def test_what_came_before_the_end_is_kept(bare: Kvm) -> None:
    """A write to no memory: the exit before it in the same step is seen all the same."""
    # CPUID; MOV [RDI], EAX, where no memory is
    code = {"do": "code", "parts": ["0fa2", "8907"]}
    enter = {"do": "enter", "name": "vmlaunch", "most": 8}
    with L1(bare) as l1:
        seen = replay(l1, [*START, code, {**enter, "regs": {"rdi": 0x10000000}}])
    ends = [each["end"] for each in seen[-1]]
    assert ends == [["Exit", 10], ["written"], ["host", "memory that is not there"]]
