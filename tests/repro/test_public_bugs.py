"""The list of public bugs names cases, reproducers and mutants that exist; its page is whole."""

import ast
import functools
import sys
from pathlib import Path

import pytest

import kvmnest
import kvmnest.suite
from kvmnest.errors import HarnessError
from kvmnest.mutants import catalogue
from kvmnest.repro import corpus, evidence, ladder, public

SUITE = Path(kvmnest.suite.__path__[0])
BUGS = public.load()
EACH = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)


@functools.cache
def functions(name: str) -> set[str]:
    tree = ast.parse((SUITE / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_list_is_whole():
    assert len(BUGS) == 37
    assert len({bug.id for bug in BUGS}) == len({bug.number for bug in BUGS}) == 37


@EACH
def test_what_it_names_exists(bug):
    for case in bug.cases:
        name, _, function = case.partition("::")
        assert (SUITE / name).is_file(), case
        assert not function or function in functions(name), case
    scripts = {each.id: each for each in corpus.load()}
    if bug.repro:
        script = scripts[bug.repro]
        assert bug.repro != bug.id or bug.cve in ("", script.bug.cve)
    assert set(bug.mutants) <= {mutant.id for mutant in catalogue.load()}


@EACH
def test_a_case_was_seen_to_fail_or_the_list_says_what_is_left(bug):
    fails, passes = public.seen(bug, ladder.load(), evidence.load())
    if not (bug.cases and fails):
        assert bug.left, f"{bug.id}: nothing fails, and the list does not say why"
    if bug.repro:
        assert fails, f"{bug.id}: kvmnest repro verify {bug.repro}"
        assert passes, bug.id


@EACH
def test_a_prediction_has_an_outcome(bug):
    assert not bug.predicted or bug.happened, bug.id


def test_the_page(monkeypatch):
    extension = Path(kvmnest.__file__).parent / "docs" / "extension"
    monkeypatch.setattr(sys, "path", [str(extension), *sys.path])
    import tables

    lines = tables.table(tables.BUGS).splitlines()
    assert len(lines) == 2 + 37
    assert {line.replace(r"\|", "").count("|") for line in lines} == {7}
    assert tables.BUGS in (extension.parent / "public-bugs.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[bug]]\nid = "x"\ntitle = "t"', "bug x: needs number, id and title"),
        ('[[bug]]\nnumber = 1\nid = "x"\ntitle = "t"\nkind = 1', "bug x: unknown key kind"),
    ],
)
def test_a_bad_list(tmp_path, text, said):
    path = tmp_path / "bugs.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=said):
        public.load(path)
