"""Edits of C sources, and that every entry of the catalogue is well formed."""

import json
from pathlib import Path

import pytest

from kvmnest.errors import HarnessError, UsageError
from kvmnest.kernel.edits import (
    Edit,
    EditError,
    apply_all,
    function_span,
    newer_texts,
    text_for,
)
from kvmnest.mutants import catalogue
from kvmnest.mutants.record import DETECTED, MISSED

SOURCE = """\
static int first(int a);

/* calls first(a) */
static int first(int a)
{
\tif (a > 1 ||
\t    a < 0)
\t\treturn 1;
\treturn 0;
}

int second(int a,
\t   int b)
{
\treturn first(a) + first(b) + first(a);
}
"""


def edit(function: str, expression: str, replacement: str = "X") -> Edit:
    return Edit("a.c", function, expression, replacement)


def test_span_is_the_definition() -> None:
    start, end = function_span(SOURCE, "first")
    assert SOURCE[start:end].startswith("static int first(int a)\n{")
    assert SOURCE[start:end].endswith("return 0;\n}")
    start, end = function_span(SOURCE, "second")
    assert SOURCE[start:end].startswith("int second(int a,\n")


def test_only_the_named_function_changes() -> None:
    changed = edit("first", "return 0;", "return 2;").apply(SOURCE)
    assert changed == SOURCE.replace("return 0;", "return 2;")


def test_white_space_is_any_white_space() -> None:
    changed = edit("first", "if (a > 1 || a < 0)", "if (0)").apply(SOURCE)
    assert "\tif (0)\n\t\treturn 1;" in changed


@pytest.mark.parametrize(
    ("function", "expression", "message"),
    [
        ("second", "return 0;", "does not occur in second()"),
        ("second", "first(a)", "occurs 2 times in second()"),
        ("third", "return", "no definition of function third()"),
        ("first", "", "does not occur"),
    ],
)
def test_edit_that_does_not_fit(function: str, expression: str, message: str) -> None:
    with pytest.raises(EditError, match=message.replace("(", r"\(").replace(")", r"\)")):
        edit(function, expression).apply(SOURCE)


def test_a_bad_edit_leaves_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text(SOURCE)
    with pytest.raises(EditError):
        apply_all([edit("first", "return 0;"), edit("first", "nothing")], tmp_path)
    assert (tmp_path / "a.c").read_text() == SOURCE
    with pytest.raises(EditError, match=r"b\.c: No such file"):
        apply_all([Edit("b.c", "", "x", "y")], tmp_path)


def test_several_edits_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text(SOURCE)
    apply_all([edit("first", "return 0;", "return 5;"), edit("second", "int b", "int c")], tmp_path)
    text = (tmp_path / "a.c").read_text()
    assert "return 5;" in text
    assert "int c)" in text


def test_the_newest_text_that_is_not_newer_than_the_kernel() -> None:
    first = edit("f", "x")
    newer = newer_texts(
        first, [{"since": "6.12", "function": "g"}, {"since": "7.2", "expression": "y"}]
    )
    releases = ("6.1.0-56-cloud-amd64", "6.9.1", "6.12.117+deb13-amd64", "7.2.13", "7.10.1", "mine")
    chosen = [text_for(first, newer, release) for release in releases]
    old, middle, new = first, edit("g", "x"), edit("f", "y")
    assert chosen == [old, old, middle, new, new, old]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"function": "g"}], "needs since"),
        ([{"since": "7", "function": "g"}], "needs since"),
        ([{"since": "7.2", "note": "g"}], "unknown key note"),
        ([{"since": "7.2"}], "changes no text"),
        ([{"since": "7.2", "file": "b"}, {"since": "6.12", "file": "c"}], "from old to new"),
    ],
)
def test_newer_texts_that_are_none(tables: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newer_texts(edit("f", "x"), tables)


def test_the_catalogue() -> None:
    mutants = catalogue.load()
    assert len(mutants) >= 129
    for mutant in mutants:
        for one in (mutant.edit, *(newer.edit for newer in mutant.newer)):
            assert one.expression.split() != one.replacement.split(), mutant.id
        assert mutant.masked or mutant.cases, f"{mutant.id} names no case"
        assert "hash" not in mutant.origin or mutant.origin["subject"]


@pytest.mark.parametrize("name", ["mutants-detected.json", "mutants-detected-7.3.json"])
def test_the_tables_of_what_was_noticed(name: str) -> None:
    """What was scored is detected by a case of the suite, or there is a reason."""
    table = json.loads((catalogue.MUTANTS_FILE.parent / name).read_text())
    rows = {row["id"]: row for row in table["mutants"]}
    mutants = [mutant for mutant in catalogue.load() if mutant.id in rows]
    assert len(mutants) == len(rows) >= 100
    assert table["totals"]["does not apply"] == 0
    assert table["totals"]["detected"] >= 90
    for mutant in mutants:
        row = rows[mutant.id]
        assert row["case"] if row["verdict"] == DETECTED else row["text"], mutant.id
        assert row["verdict"] != MISSED or mutant.missed, f"{mutant.id} is missed without a reason"


def test_patterns_of_cases() -> None:
    ids = ["test_a.py::test_x[1-b]", "test_a.py::test_xy", "test_b.py::test_x"]
    mutant = catalogue.Mutant("m", "t", edit("f", "a"), cases=("test_b*", "test_a.py::test_x"))
    assert mutant.first_cases(ids) == ["test_b.py::test_x", "test_a.py::test_x[1-b]"]
    assert catalogue.matches(ids[0], ids[0])


def test_selection() -> None:
    mutants = catalogue.load()
    assert [m.id for m in catalogue.select(mutants, "vpid-zero, vmxon-cpl3")] == [
        "vpid-zero",
        "vmxon-cpl3",
    ]
    assert catalogue.select(mutants, "") == mutants
    with pytest.raises(UsageError, match="no mutant nonsense"):
        catalogue.select(mutants, "vmxon-*,nonsense")


ENTRY = '[[mutant]]\nid = "a"\ntitle = "t"\nfile = "f"\nfunction = "g"\nexpression = "e"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY, "mutant a: no text replacement"),
        (ENTRY + 'replacement = "r"\nnote = "n"\n', "mutant a: unknown key note"),
        (ENTRY + 'replacement = "r"\nnewer = [{ since = "7" }]\n', "mutant a: newer needs since"),
        (ENTRY + 'replacement = "r"\nnewer = [{ since = "7.2" }]\n', "changes no text"),
        ((ENTRY + 'replacement = "r"\n') * 2, "mutant a is there twice"),
        ("[[mutant", "is not TOML"),
    ],
)
def test_bad_catalogue(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mutants.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=message):
        catalogue.load(path)
