"""JUnit XML, in the form that GitLab, Jenkins and GitHub actions read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from kvmnest.errors import HarnessError
from kvmnest.results.model import PATCHES, Case, Run

# XML 1.0 has no place for most control characters, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def write(run: Run, path: Path) -> None:
    """Write all results. Raises HarnessError if the path cannot be written."""
    try:
        with open(path, "wb") as file:
            tree(run).write(file, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise HarnessError(
            f"cannot write the JUnit report to {path}: {error.strerror or error}"
        ) from error


def tree(run: Run) -> ET.ElementTree[ET.Element]:
    """Return the document: one suite with a case per case, and one for each problem of the run.

    Known deviations count as skipped.
    """
    counts = run.summary()
    numbers = {
        "tests": str(len(run.cases) + len(run.problems)),
        "failures": str(counts["failed"]),
        "errors": str(counts["error"] + len(run.problems)),
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
    for case in run.cases:
        suite.append(_element(case))
    for problem in run.problems:
        # A suite without any failure would be taken for a good one.
        element = ET.SubElement(suite, "testcase", classname="kvmnest", name="the run as a whole")
        ET.SubElement(element, "error", message=_clean(problem))
    return ET.ElementTree(root)


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
        message = case.summary or case.detail.partition("\n")[0]
        if case.outcome == "known":
            message = f"known deviation: {message}"
        child = ET.SubElement(element, tag[case.outcome], message=_clean(message))
        if case.outcome in ("failed", "error"):
            child.text = _clean(case.detail + (f"\nrerun: {case.rerun}" if case.rerun else ""))
    return element
