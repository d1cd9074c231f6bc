"""kvmnest repro: the scripts that ship with it, their record, and scripts of a user."""

import ast
import json
import re
from pathlib import Path

import pytest

from kvmnest.errors import HarnessError, UsageError
from kvmnest.mutants import catalogue
from kvmnest.mutants.record import DETECTED
from kvmnest.repro import corpus, evidence, ladder
from kvmnest.repro.check import FIXED, VULNERABLE

ROOT = Path(catalogue.MUTANTS_FILE).parent
SCRIPT = '''\
"""A bug."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug

BUG = Bug(subject="x", vulnerable="a", correct="b")


@pytest.mark.sdm("VMXON")
def test_it(l1: L1) -> None:
    """Rule."""
    assert l1.vmxon()
'''
EDIT = '{"file": "f.c", "function": "f", "expression": "x", "replacement": "y"}'


def test_the_corpus_is_large():
    found = corpus.load()
    assert len(found) >= 40
    cves = {each.bug.cve for each in found}
    assert {"CVE-2018-12904", "CVE-2016-9588", "CVE-2014-3645", "CVE-2014-3646"} <= cves


def test_the_corpus_is_large_and_knows_since_when():
    assert len(corpus.load()) >= 75
    assert sum(bool(each.bug.since) for each in corpus.load()) >= 50


def test_every_real_bug_that_the_suite_notices_has_a_script():
    """A mutant with an upstream commit either is a script or is one that nothing can show here."""
    scores = json.loads((ROOT / "mutants-detected.json").read_text())["mutants"]
    detected = {score["id"] for score in scores if score["verdict"] == DETECTED}
    real = {mutant.id for mutant in catalogue.load() if mutant.origin.get("subject")}
    scripts = {each.id for each in corpus.load()}
    assert scripts <= real
    assert real & detected <= scripts


def test_the_catalogue_of_mutants_repeats_nothing():
    text = catalogue.MUTANTS_FILE.read_text()
    for each in corpus.load():
        assert f'bug = "{each.id}"' in text, each.id
        assert f'id = "{each.id}"' not in text
        assert each.bug.subject not in text


@pytest.mark.parametrize(
    "each", [*corpus.load(), *corpus.load(corpus.UNFIXED)], ids=lambda each: each.id
)
def test_a_script_is_short_and_stands_alone(each):
    """A reader needs this file and the documented API, nothing of the suite."""
    tree = ast.parse(each.path.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= {
        *("contextlib", "pathlib", "threading", "pytest", "kvmnest.kvm", "kvmnest.kvm.cpuid"),
        *("kvmnest.l1", "kvmnest.repro"),
        *("kvmnest.vmx", "kvmnest.vmx.outcome"),
    }
    (test,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert ast.get_docstring(test)
    assert test.end_lineno - test.lineno <= 30
    bug = each.bug
    # Either a fix upstream that an edit takes back, or edits that are a fix.
    assert bool(bug.subject) == bool(bug.edit) != bool(bug.fix)
    assert bug.vulnerable != bug.correct
    assert not bug.hash or re.fullmatch(r"[0-9a-f]{12}", bug.hash)
    assert not bug.cve or re.fullmatch(r"CVE-\d{4}-\d{4,}", bug.cve)
    for edit in each.fix or (each.edit,):
        assert edit.file.startswith(("arch/x86/kvm/", "virt/kvm/"))


def test_words_for_many():
    """ "all" is a question about fixed bugs; the others have a word of their own."""
    assert corpus.select(["all"]) == list(corpus.load())
    unfixed = corpus.select(["unfixed"])
    assert unfixed == list(corpus.load(corpus.UNFIXED))
    assert not {each.id for each in unfixed} & {each.id for each in corpus.load()}
    assert corpus.select([unfixed[0].id, str(unfixed[0].path)]) == unfixed[:1]
    assert all(each.shipped for each in unfixed)


def test_every_script_was_shown_both_ways():
    """With its edit, or on a kernel of Debian's that has the bug and on one that has not."""
    record, kernels = evidence.load(), ladder.load().verdicts
    for each in corpus.load():
        if each.id not in record and {VULNERABLE, FIXED} <= set(kernels.get(each.id, {}).values()):
            continue
        verify = f"kvmnest repro verify --record {evidence.RECORD} {each.id}"
        assert record.get(each.id), verify
        for seen in record[each.id]:
            assert seen.script == each.script(seen.kernel), f"{each.id} was changed: {verify}"
        assert record[each.id][0].both_ways, f"{each.id}: {record[each.id][0]}"
    assert set(record) <= {each.id for each in corpus.load()}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("A bug.", "The bug.", False),
        ('vulnerable="a"', 'vulnerable="c", cve="CVE-2026-0001"', False),
        ("assert l1.vmxon()", "assert not l1.vmxon()", True),
        ('correct="b"', 'correct="b", params={"ept": "0"}', True),
        ('correct="b"', 'correct="b", death="VmLost: "', True),
        ('correct="b"', f'correct="b", fix=[{EDIT}]', True),
    ],
)
def test_a_record_gets_stale_by_what_a_script_does(tmp_path, old, new, changes):
    path = tmp_path / "my_bug.py"
    path.write_text(SCRIPT)
    before = corpus.read(path).script("6.1")
    assert old in SCRIPT
    path.write_text(SCRIPT.replace(old, new))
    assert (corpus.read(path).script("6.1") != before) is changes


def test_a_newer_text_of_the_edit_is_the_newer_kernels(tmp_path):
    edit = 'edit={"file": "f.c", "function": "f", "expression": "x", "replacement": "y"}'
    newer = edit + ', newer=[{"since": "7.2", "function": "g"}]'
    hashes = {}
    for text in (edit, newer):
        path = tmp_path / "my_bug.py"
        path.write_text(SCRIPT.replace('correct="b"', f'correct="b", {text}'))
        found = corpus.read(path)
        hashes[text] = [found.script(release) for release in ("6.1.0-9-amd64", "7.3.4-amd64")]
    assert found.edit_for("6.12.117-amd64").function == "f"
    assert found.edit_for("7.10.1-amd64").function == "g"
    assert hashes[edit][0] == hashes[newer][0] == hashes[edit][1] != hashes[newer][1]


def test_a_script_of_the_user(tmp_path):
    path = tmp_path / "my_bug.py"
    path.write_text(SCRIPT)
    (found,) = corpus.select([str(path)])
    assert (found.id, found.title, found.shipped, found.edit) == ("my-bug", "A bug", False, None)
    # One of kvmnest's by its path is that one.
    (same,) = corpus.select([str(corpus.load()[0].path)])
    assert same is corpus.load()[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "cannot read"),
        (b"\xff\xfe", "no UTF-8"),
        (b"def f(:\n", ":1: invalid syntax"),
        (b"a = 1\nb = nothing\n", ":2: NameError: name 'nothing' is not defined"),
        (b"raise SystemExit(3)\n", ":1: SystemExit: 3"),
        (b'"""A."""\n', "it has no BUG = Bug"),
        (SCRIPT.encode().replace(b'"""A bug."""', b""), "no docstring"),
        (SCRIPT.encode().replace(b"def test_it", b"def it"), "no functions named test_"),
        (SCRIPT.encode() + b"def test_more():\n    pass\n", "2 functions named test_"),
        (SCRIPT.encode().replace(b'"b"', b'"b", edit={"file": "a"}'), "edit needs the texts"),
        (SCRIPT.encode().replace(b'"b"', b'"b", fix=[{"file": "a"}]'), "edit needs the texts"),
        (SCRIPT.encode().replace(b'"b"', b'"b", params={"ept": 0}'), "params are texts"),
        (SCRIPT.encode().replace(b'"b"', b'"b", since="v5.0"'), "since needs since_by"),
        (SCRIPT.encode().replace(b'"b"', b'"b", since_by="Fixes"'), "since needs since_by"),
        (SCRIPT.encode().replace(b'"b"', b'"b", since="v5", since_by="me"'), "one of Fixes"),
        (SCRIPT.encode().replace(b', vulnerable="a"', b""), "missing 1 required keyword-only"),
    ],
)
def test_what_is_no_reproducer(tmp_path, source, said):
    path = tmp_path / "my_bug.py"
    if source is not None:
        path.write_bytes(source)
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        corpus.select([str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '{"schema": 1, "shown": {}}', '{"schema": 2, "shown": {"a": {"6.1": {}}}}', "{"],
)
def test_a_damaged_record(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(HarnessError, match="not a record of kvmnest repro verify"):
        evidence.load(path)


def test_a_record_is_kept(tmp_path):
    path = tmp_path / "x.json"
    assert evidence.start(path) == {}
    with pytest.raises(UsageError, match="there is no folder"):
        evidence.start(tmp_path / "none" / "x.json")
    seen = evidence.Seen("FIXED", "a"), evidence.Seen("VULNERABLE", "b")
    both = evidence.Shown("6.1.0-9-amd64", "0", *seen)
    evidence.save(path, {"vmx-cpl": [both]})
    assert evidence.start(path) == {"vmx-cpl": [both]}
    assert both.both_ways


def test_a_record_has_one_kernel_of_each_series(tmp_path):
    seen = evidence.Seen("FIXED", "a"), evidence.Seen("VULNERABLE", "b")
    record = {}
    for kernel in ("7.3.4+deb13-amd64", "6.1.0-9-amd64", "6.12.5-amd64", "6.1.0-40-amd64"):
        evidence.add(record, "vmx-cpl", evidence.Shown(kernel, "0", *seen))
    kernels = [each.kernel for each in record["vmx-cpl"]]
    assert kernels == ["6.1.0-40-amd64", "6.12.5-amd64", "7.3.4+deb13-amd64"]
    path = tmp_path / "x.json"
    evidence.save(path, record)
    assert evidence.load(path) == record
