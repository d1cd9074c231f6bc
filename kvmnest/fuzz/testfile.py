"""A finding as a test: a file that pytest with kvmnest's fixtures runs as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmnest.fuzz.judge import Judge, shown
from kvmnest.fuzz.model import FuzzCase, base_memory
from kvmnest.fuzz.run import Finding
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import EntryFailure, Outcome, VMfailValid

_PAGE = 4096
_AREA_COUNTS = (
    Field.VM_ENTRY_MSR_LOAD_COUNT,
    Field.VM_EXIT_MSR_STORE_COUNT,
    Field.VM_EXIT_MSR_LOAD_COUNT,
)


def write(finding: Finding, judge: Judge, seed: int, target: str) -> str:
    """Source of the test. It states what the rules say, so it fails where the finding was made."""
    case = finding.case
    prediction = judge.predict(case)
    failures = (
        [_source(outcome) for outcome in prediction.failures] if prediction.violations else []
    )
    section = prediction.violations[0].section if prediction.violations else "VM Entries"
    kinds = {type(outcome).__name__ for outcome in prediction.failures}
    if not prediction.must_fail or finding.before:
        kinds.add("Exit")
    imports = [f"from kvmnest.vmx.outcome import {', '.join(sorted(kinds))}"]
    names = ["Field", *(["ExitReason"] if "EntryFailure" in kinds else ())]
    names += ["VmxError"] if "VMfailValid" in kinds else []
    imports.insert(0, f"from kvmnest.vmx import {', '.join(sorted(names))}")
    lines = [
        f'"""Found by `kvmnest fuzz --target {target} --seed {seed}`, case {finding.number}.',
        "",
        f"Seen on {judge.kernel}: {shown(finding.seen)}. The rules:",
        *(f"  {violation}" for violation in prediction.violations or ("none objects",)),
        '"""',
        "",
        "import pytest",
        "",
        "from kvmnest.l1 import L1, L2Mode",
        *imports,
        "",
        "",
        "@pytest.mark.series(16)",
        f'@pytest.mark.sdm("{section}")',
        f"def test_fuzz_{seed}_{finding.number}(l1: L1) -> None:",
        f"    vmcs = l1.launchable(mode=L2Mode.{case.mode.name})",
        *_entries(finding, judge),
    ]
    wanted = [f"outcome == {text}" for text in failures]
    if not prediction.must_fail:
        wanted.append("isinstance(outcome, Exit)")
    lines.append(f"    assert {' or '.join(wanted)}")
    return "\n".join(lines) + "\n"


def _entries(finding: Finding, judge: Judge) -> Iterator[str]:
    """What is written before each VM entry, and the entry; only the last one's outcome counts."""
    now = dict(judge.base(FuzzCase(finding.case.mode, bare=True)))
    if finding.before:
        yield "    launched = False"
    for case in (*finding.before, finding.case):
        for label, content in _memory(case, judge).items():
            text = content.rstrip(b"\0").hex()
            yield f'    l1.write(l1.sym("{label}"), bytes.fromhex("{text}"))'
        # As the run did it: a field that this case does not have is 0 if an earlier one set it.
        wanted = {**dict.fromkeys(now, 0), **case.fields(judge.base(case))}
        for field, value in wanted.items():
            if now.get(field) != value:
                yield f"    vmcs[Field.{field.name}] = {_value(value, judge.payload)}"
        now = wanted
        if not finding.before:
            yield "    outcome = l1.vmlaunch()"
        else:
            yield "    outcome = l1.vmresume() if launched else l1.vmlaunch()"
            if case is not finding.case:
                yield "    launched = launched or isinstance(outcome, Exit)"


def _memory(case: FuzzCase, judge: Judge) -> Mapping[str, bytes]:
    """Memory that the case needs: its own, and the MSR areas if it uses any."""
    fields = case.fields(judge.base(case))
    areas = any(value for field, value in fields.items() if field in _AREA_COUNTS)
    return {**(base_memory() if areas else {}), **case.memory}


def _value(value: int, payload: Payload) -> str:
    if value >= 0x1000 and value % _PAGE == 0:
        for label, address in payload.symbols.items():
            if address == value and label.islower():
                return f'l1.sym("{label}")'
    return f"{value:#x}"


def _source(outcome: Outcome) -> str:
    if isinstance(outcome, VMfailValid):
        return f"VMfailValid(VmxError.{outcome.error.name})"
    assert isinstance(outcome, EntryFailure)
    return f"EntryFailure(ExitReason.{outcome.reason.name}, {outcome.qualification})"
