"""JUnit XML, in the form that GitLab, Jenkins and GitHub actions read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from kvmnest.reports.model import FAILED, PATCHES, Case, Run
from kvmnest.reports.wholefile import WholeFile

# XML 1.0 has no place for most control characters, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


class JUnitFile:
    """Keeps a Run in a file, whole after every case; see WholeFile for errors.

    One suite with a case per case, and one for each problem of the run. Known deviations count
    as skipped.
    """

    def __init__(self, path: Path) -> None:
        self._file = WholeFile(path, "the JUnit report")
        self._cases: list[str] = []

    @property
    def problem(self) -> str:
        """Why the last write failed, "" if it did not."""
        return self._file.problem

    def start(self, run: Run) -> None:
        """Write for the first time. Raises HarnessError if that fails."""
        self._file.start(self._text(run))

    def write(self, run: Run) -> None:
        """Replace the file by one with all that is known now."""
        self._file.write(self._text(run))

    def _text(self, run: Run) -> bytes:
        for case in run.cases[len(self._cases) :]:
            self._cases.append(ET.tostring(_element(case), encoding="unicode"))
        problems = list(run.problems)
        if not run.finished and not run.complete:
            # So it is left if the run is killed; a suite that lacks cases must not look good.
            left = len(run.planned) - len(run.cases)
            problems.append(f"the run did not come to its end: {left} cases have no result")
        head, tail = _frame(run, problems)
        return f"{_HEAD}{head}{''.join(self._cases)}{tail}\n".encode()


_HEAD = "<?xml version='1.0' encoding='utf-8'?>\n"
_MARK = "cases"


def _frame(run: Run, problems: list[str]) -> tuple[str, str]:
    """What stands before and after the cases."""
    counts = run.summary()
    numbers = {
        "tests": str(len(run.cases) + len(problems)),
        "failures": str(counts["failed"]),
        "errors": str(counts["error"] + len(problems)),
        "skipped": str(counts["skipped"] + counts["known"]),
        "time": f"{sum(case.seconds for case in run.cases):.3f}",
    }
    root = ET.Element("testsuites", {"name": "kvmnest", **numbers})
    suite = ET.SubElement(
        root, "testsuite", {"name": "kvmnest", "timestamp": run.started, **numbers}
    )
    properties = ET.SubElement(suite, "properties")
    facts = {"target": run.target, **run.facts, **run.facts.get("kvm_params", {})}
    for name, value in facts.items():
        if name != "kvm_params":
            ET.SubElement(properties, "property", name=_clean(name), value=_clean(str(value)))
    suite.append(ET.Comment(_MARK))
    for problem in problems:
        # A suite without any failure would be taken for a good one.
        element = ET.SubElement(suite, "testcase", classname="kvmnest", name="the run as a whole")
        ET.SubElement(element, "error", message=_clean(problem))
    head, _, tail = ET.tostring(root, encoding="unicode").partition(f"<!--{_MARK}-->")
    return head, tail


def _element(case: Case) -> ET.Element:
    file, _, name = case.id.partition("::")
    element = ET.Element(
        "testcase",
        classname=_clean(file.removesuffix(".py").replace("/", ".")),
        name=_clean(name),
        file=_clean(file),
        time=f"{case.seconds:.6f}",
    )
    properties = ET.SubElement(element, "properties")
    if case.sdm:
        ET.SubElement(properties, "property", name="sdm", value=_clean(case.sdm))
    if case.series is not None:
        text = f"{case.series}: {PATCHES.get(case.series, '')}"
        ET.SubElement(properties, "property", name="series", value=_clean(text))
    tag = {"failed": "failure", "error": "error", "skipped": "skipped", "known": "skipped"}
    if case.outcome in tag:
        message = case.headline
        if case.outcome == "known":
            message = f"known deviation: {message}"
        child = ET.SubElement(element, tag[case.outcome], message=_clean(message))
        if case.outcome in FAILED:
            child.text = _clean(case.detail + (f"\nrerun: {case.rerun}" if case.rerun else ""))
    return element
