"""From the addresses that a kernel tells to blocks, and to what reached them first."""

import pytest

from kvmnest.coverage.collect import BEFORE, Collector, CoveredMachine, CoveredTarget
from kvmnest.errors import HarnessError
from kvmnest.fuzz.machines import LabMachine
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.targets import Ended

NESTED, X86 = "arch/x86/kvm/vmx/nested.c", "arch/x86/kvm/x86.c"
AT = {"kvm_intel": {".text": 0x1000, ".init.text": 0x9000}, "kvm": {".text": 0x5000}}
ELSEWHERE = {"kvm_intel": {".text": 0x7000}, "kvm": {".text": 0x1000}}


def told(*new, sections=None, lost=""):
    return {"e": "coverage", "new": [*new], "sections": sections or {}, "lost": lost}


def test_each_section_of_each_module_has_its_place(built):
    collector = Collector(built)
    collector.boot().take(told(0x1020, 0x9010, 0x5010, sections=AT), "a")
    assert collector.record.sources[NESTED].first == ["", "a", "a"]
    assert collector.record.sources[X86].first == ["a"]


def test_labs_that_load_the_modules_elsewhere_join(built):
    collector = Collector(built)
    one, two = collector.boot(), collector.boot()
    one.take(told(0x1010, sections=AT), "a")
    two.take(told(0x7010, sections=ELSEWHERE), "b")
    two.take(told(0x7020), "c")
    one.take(told(0x1020), "d")
    assert collector.record.sources[NESTED].first == ["a", "c", ""]
    # 0x1010 is a block of kvm in the other lab.
    assert collector.record.sources[X86].first == [""]


def test_addresses_of_headers_are_left_out(built):
    collector = Collector(built)
    collector.boot().take(told(0x1011, 0xDEAD, sections=AT), "a")
    assert collector.told
    assert collector.record.sources[NESTED].first == ["", "", ""]


def test_lost_blocks_are_an_error(built):
    with pytest.raises(HarnessError, match="does not tell all blocks: too large"):
        Collector(built).boot().take(told(lost="too large"), "a")


@pytest.fixture
def events(monkeypatch):
    """What the lab says, whether asked for cases or for those of the fuzzer."""
    said = []

    def run(self, what, on_event, *more):
        for event in said:
            on_event(event)
        return Ended(0)

    for lab in (LabTarget, LabMachine):
        monkeypatch.setattr(lab, "__init__", lambda self, **arguments: None)
        monkeypatch.setattr(lab, "run", run)
    return said


def test_what_a_case_reached_is_told_with_its_id(built, events):
    collector, passed = Collector(built), []
    cases = [{"e": "start", "id": name} for name in ("test_a", "test_b")]
    events += [told(0x1010, sections=AT), cases[0], told(0x1020), cases[1], told(0x9010)]
    CoveredTarget(collector).run([], passed.append)
    assert collector.record.sources[NESTED].first == [BEFORE, "test_a", "test_b"]
    assert passed == cases


def test_what_a_case_of_the_fuzzer_reached_is_told_with_its_number(built, events):
    collector, passed = Collector(built), []
    first = told(0x1010, sections=AT)
    events += [{"coverage": first}, {"start": 7}, {"coverage": told(0x1020)}]
    CoveredMachine(collector, 5).run([], passed.append, None)
    assert collector.record.sources[NESTED].first == [BEFORE, "fuzz --seed 5, case 7", ""]
    assert passed == [{"start": 7}]
