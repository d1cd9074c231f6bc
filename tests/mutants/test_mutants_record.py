"""The record of scores on disk, and the table made from it."""

import json
import os
from pathlib import Path

import pytest

from kvmnest.errors import HarnessError
from kvmnest.kernel.edits import Edit
from kvmnest.mutants import record, table
from kvmnest.mutants.catalogue import Mutant
from kvmnest.mutants.record import DETECTED, MASKED, MISSED, Score
from kvmnest.run.suite_state import suite_state

MUTANT = Mutant("one", "a bug", Edit("a.c", "f", "x", "y"), params={"ept": "0"})
KEY = record.mutant_key(MUTANT, "6.1")


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    first = record.load(path, "6.1")
    first.add("one", Score(DETECTED, KEY, "s", case="c", outcome="failed", text="t", ran=3))
    first.add_clean({"b": "1", "a": "0"}, "s", ["c", "d"])
    again = record.load(path, "6.1")
    assert again == record.Record(path, "6.1", first.scores, "s", {"a=0 b=1": ["c", "d"]})
    assert os.listdir(tmp_path) == ["state.json"]


def test_another_kernel_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    record.load(path, "6.1").add("one", Score(DETECTED, KEY))
    assert record.load(path, "6.12").scores == {}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', "{"])
def test_file_that_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(HarnessError, match="--fresh"):
        record.load(path, "6.1")


def test_what_needs_no_new_run(tmp_path: Path) -> None:
    found = record.Record(tmp_path / "s", "6.1")
    assert not found.holds(MUTANT, KEY, "suite")
    found.scores["one"] = Score(DETECTED, KEY, "old suite")
    assert found.holds(MUTANT, KEY, "suite")
    assert not found.holds(MUTANT, "another edit", "suite")
    found.scores["one"] = Score(MISSED, KEY, "old suite")
    assert not found.holds(MUTANT, KEY, "suite")
    assert found.holds(MUTANT, KEY, "old suite")
    assert found.holds(MUTANT, KEY, "suite", "old suite")


def test_clean_cases_hold_for_one_suite(tmp_path: Path) -> None:
    found = record.Record(tmp_path / "s", "6.1")
    found.add_clean({}, "suite", ["a"])
    found.add_clean({}, "suite", ["b"])
    assert found.clean_cases({}, "suite") == {"a", "b"}
    assert found.clean_cases({"ept": "0"}, "suite") == set()
    assert found.clean_cases({}, "changed suite") == set()
    found.add_clean({}, "changed suite", ["c"])
    assert found.clean == {"": ["c"]}


def test_state_that_cannot_be_written(tmp_path: Path) -> None:
    found = record.Record(tmp_path / "missing" / "state.json", "6.1")
    with pytest.raises(HarnessError, match="cannot write"):
        found.add("one", Score(DETECTED, KEY))


def test_key_follows_edit_and_parameters() -> None:
    other = Mutant("one", "a bug", Edit("a.c", "f", "x", "z"), params={"ept": "0"})
    plain = Mutant("one", "a bug", MUTANT.edit)
    assert len({KEY, record.mutant_key(other, "6.1"), record.mutant_key(plain, "6.1")}) == 3
    assert suite_state() == suite_state()


def test_table_and_document() -> None:
    mutants = [MUTANT, Mutant("two", "b", MUTANT.edit), Mutant("three", "c", MUTANT.edit)]
    scores = {
        "one": Score(MISSED, KEY, text="no failure in the suite (9 cases)"),
        "two": Score(DETECTED, KEY, case="t.py::c", outcome="failed", text="assert 1 ==\n 2"),
        "three": Score(MASKED, KEY, text="no such CPU"),
    }
    assert table.table(mutants, scores, "6.1") == [
        "two    t.py::c (failed: assert 1 == 2)",
        "one    missed: no failure in the suite (9 cases)",
        "three  masked: no such CPU",
        "",
        "3 mutants of 6.1: 1 detected, 1 missed, 1 masked",
    ]
    written = table.document(mutants, scores, "6.1")
    assert json.loads(json.dumps(written))["totals"]["detected"] == 1
    assert written["mutants"][1]["case"] == "t.py::c"
    assert table.listing([MUTANT]) == ["one  a bug (ept=0)"]
