"""Bugs by kernels: the record, what it says about a kernel, tables and the page."""

import re

import pytest

from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.known import kernel_version
from kvmnest.repro import corpus, ladder, page, table
from kvmnest.repro.check import FIXED, NO_VERDICT, NOT_APPLICABLE, VULNERABLE, Verdict
from kvmnest.repro.ladder import Ladder

OLD, LAST, NEW = "6.1.0-47-cloud-amd64", "6.1.0-50-cloud-amd64", "6.1.0-51-cloud-amd64"
NEWER, NEWEST = "6.12.118+deb13-cloud-amd64", "7.3.4+deb13-cloud-amd64"
ROWS = {
    "fixed-in-51": {OLD: VULNERABLE, LAST: VULNERABLE, NEW: FIXED, NEWER: FIXED},
    "always-fixed": {OLD: FIXED, NEW: FIXED, NEWER: FIXED},
    "never-fixed": {OLD: VULNERABLE, NEW: VULNERABLE, NEWER: NOT_APPLICABLE},
    "new-bug": {OLD: FIXED, NEWER: FIXED, NEWEST: VULNERABLE},
    "came-back": {OLD: FIXED, LAST: VULNERABLE, NEW: FIXED},
    "not-asked": {OLD: NOT_APPLICABLE, NEW: NO_VERDICT},
}


def verdict(name: str, kind: str, evidence: str = "seen") -> Verdict:
    (each,) = corpus.select([name])
    return Verdict(each, kind, NEW, evidence)


@pytest.mark.parametrize(
    ("bug", "fixed", "since"),
    [
        ("fixed-in-51", "6.1.0-51", "before 6.1.0-47"),
        ("always-fixed", "before 6.1.0-47", ""),
        ("never-fixed", "", "before 6.1.0-47"),
        ("new-bug", "before 6.1.0-47", "7.3.4"),
        ("came-back", "6.1.0-51", "6.1.0-50"),
        ("not-asked", "", ""),
        ("unknown", "", ""),
    ],
)
def test_what_the_record_says(bug, fixed, since):
    found = Ladder(ROWS)
    assert found.first_fixed(bug, OLD) == fixed
    assert found.since(bug) == since


def test_where_it_was_seen():
    assert Ladder(ROWS).seen("came-back") == (["6.1.0-50"], ["6.1.0-47", "6.1.0-51"])
    assert Ladder(ROWS).seen("not-asked") == Ladder(ROWS).seen("unknown") == ([], [])


def test_another_series_says_nothing():
    assert Ladder(ROWS).first_fixed("fixed-in-51", NEWEST) == ""
    assert Ladder(ROWS).first_fixed("new-bug", NEWEST) == ""


def test_kernels_go_from_old_to_new():
    assert Ladder(ROWS).kernels == [OLD, LAST, NEW, NEWER, NEWEST]
    order = kernel_version
    assert order("6.1.0-9-amd64") < order("6.1.0-10-amd64") < order("6.12.1")


def test_a_record_keeps_what_it_is_given(tmp_path):
    path = tmp_path / "record.json"
    ladder.save(path, Ladder(ROWS))
    new = Ladder({"fixed-in-51": {NEWEST: FIXED, OLD: FIXED}})
    merged = ladder.merge(ladder.load(path), new)
    assert merged.verdicts["fixed-in-51"] == {**ROWS["fixed-in-51"], NEWEST: FIXED, OLD: FIXED}
    assert merged.verdicts["came-back"] == ROWS["came-back"]
    assert ROWS["fixed-in-51"][OLD] == VULNERABLE


@pytest.mark.parametrize("text", ["junk", "[]", '{"schema": 9}', '{"schema": 1, "verdicts": []}'])
def test_a_damaged_record(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(HarnessError, match="record of kvmnest repro --kernels"):
        ladder.load(path)


def test_the_shipped_record_is_of_the_corpus():
    ids = {each.id for each in (*corpus.load(), *corpus.load(corpus.UNFIXED))}
    record = ladder.load()
    assert set(record.verdicts) <= ids
    kinds = {kind for row in record.verdicts.values() for kind in row.values()}
    assert kinds <= {VULNERABLE, FIXED, NOT_APPLICABLE, NO_VERDICT}


def test_the_table_begins_with_what_is_vulnerable():
    verdicts = [
        verdict("vmxon-revision", FIXED),
        verdict("vmx-cpl", VULNERABLE, "VMCLEAR executes"),
        verdict("vpid-zero", NOT_APPLICABLE),
        verdict("emul-l2-io", VULNERABLE),
        verdict("host-tr-sel", NO_VERDICT, "no kernel"),
    ]
    record = Ladder({"vmx-cpl": {LAST: VULNERABLE, NEW: FIXED}})
    lines = list(table.lines(verdicts, record))
    first = [line.split()[0] for line in lines if line[0] != " "]
    assert first[:1] == ["verdict"]
    assert first[1:6] == ["VULNERABLE", "VULNERABLE", "NO", "NOT", "FIXED"]
    (row,) = [line for line in lines if " vmx-cpl " in line]
    assert row.split() == ["VULNERABLE", "vmx-cpl", "CVE-2018-12904", "v4.18-rc1", "6.1.0-51"]
    assert lines[lines.index(row) + 2].strip() == "VMCLEAR executes"
    assert "no kernel" in "\n".join(lines)
    assert lines[-1] == f"2 VULNERABLE, 1 FIXED, 1 NOT APPLICABLE, 1 NO VERDICT ({NEW})"


def test_nothing_asked_is_a_table_too():
    assert list(table.lines([], Ladder()))[-1] == "nothing was asked"


def test_the_grid_has_a_letter_for_each_kernel():
    found = Ladder()
    found.add([verdict("vmx-cpl", VULNERABLE), verdict("vpid-zero", FIXED)], OLD)
    found.add([verdict("vmx-cpl", FIXED)], NEWER)
    lines = list(table.grid(corpus.select(["vmx-cpl", "vpid-zero"]), found))
    assert lines[:2] == ["           6.1.0-47", "           | 6.12.118"]
    assert lines[2:4] == ["vmx-cpl    V -", "vpid-zero  -"]


def test_the_page_escapes_what_a_kernel_said():
    found = Ladder()
    found.add([verdict("vmx-cpl", VULNERABLE, '<b>"&'), verdict("vpid-zero", FIXED)], OLD)
    text = page.page(corpus.select(["vpid-zero", "vmx-cpl"]), found)
    assert "<b>" not in text
    assert 'title="&lt;b&gt;&quot;&amp;">V</td>' in text
    assert text.index("id=vmx-cpl") < text.index("id=vpid-zero")
    assert "CVE-2018-12904" in text
    assert not re.search(r"<!--[A-Z]+-->", text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["all", "--html", "x.html"], "--html is for --kernels"),
        (["all", "--record", "x.json"], "--record is for kvmnest repro verify, and for --kernels"),
        (["list", "--kernels", "6.1"], "kvmnest repro list takes no --kernels"),
        (["all", "--kernels", "6.1", "--kernel", "6.1"], "no --kernel"),
        (["all", "--kernels", "6.1", "--target", "kvm"], "no --target kvm"),
        (["all", "--kernels", "6.1", "--html", "/nowhere/x.html"], "/nowhere"),
    ],
)
def test_usage(capsys, words, said):
    assert main(["repro", *words]) in (2, 3)
    assert said in capsys.readouterr().err


#: Upstream version of Debian's kernels whose release does not say it.
STABLE = {"6.1.0-47": (6, 1, 170), "6.1.0-56": (6, 1, 192)}


@pytest.mark.parametrize("each", corpus.load(), ids=lambda each: each.id)
def test_the_record_agrees_with_the_versions_that_have_the_fix(each):
    """A kernel from such a version on has no such bug; one before it in the same series has."""
    versions = [
        tuple(int(part) for part in found[1].split("."))
        for found in re.finditer(r"v(\d+(?:\.\d+)+)", each.bug.fixed)
    ]
    for release, verdict in ladder.load().verdicts[each.id].items():
        name = ladder.short(release)
        kernel = STABLE.get(name) or tuple(int(part) for part in name.split("."))
        stable = [v for v in versions if len(v) == 3 and v[:2] == kernel[:2]]
        if stable:
            assert verdict == (FIXED if kernel >= min(stable) else VULNERABLE), release
        elif any(kernel[:2] >= v for v in versions if len(v) == 2):
            assert verdict == FIXED, release
