"""The record of what the suite gave on each CPU model."""

import copy
import json
import subprocess
import sys

import pytest

from kvmnest.errors import UsageError
from kvmnest.reports import by_cpu_model

DOCUMENT = {
    "schema": 1, "target": "lab", "emulator": "bochs 3.0-37", "kernel": "7.3.4", "kvm_params": {},
    "summary": {"passed": 1, "failed": 0, "skipped": 1, "known": 0, "error": 0},
    "complete": True, "started": "2026-11-26T00:00:00+00:00",
    "finished": "2026-11-27T00:00:00+00:00", "seconds": 1.0, "running": None, "planned": 2,
    "not_run": [], "no_longer_known": [], "problems": [], "facts": {},
    "options": {"cpu_model": "tigerlake"},
    "cases": [
        {"id": f"test_a.py::test_{n}", "series": None, "sdm": None, "outcome": outcome,
         "seconds": 0.1, "detail": "needs"}
        for n, outcome in enumerate(("passed", "skipped"))
    ],
}  # fmt: skip


def emulators(*argv):
    command = [sys.executable, "-m", "kvmnest", "lab", "emulators", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def changed(**changes):
    return {**copy.deepcopy(DOCUMENT), **changes}


def other_cases(**changes):
    document = changed(**changes)
    for case in document["cases"]:
        case["id"] += "_too"
    return document


@pytest.fixture
def record(tmp_path):
    """Records documents; the record's rows after it."""

    def record(*documents):
        files = []
        for number, document in enumerate(documents):
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(json.dumps(document))
        by_cpu_model.record(files, tmp_path / "record.json")
        return by_cpu_model.recorded(tmp_path / "record.json")

    return record


def test_rows_are_added_and_replaced(record):
    first = record(DOCUMENT)
    assert first["tigerlake"].counts == {"passed": 1, "skipped": 1}
    assert first["tigerlake"].date == "2026-11-27"
    both = record(changed(options={"cpu_model": "broadwell_ult"}))
    assert list(both) == ["broadwell_ult", "tigerlake"]
    again = record(changed(kernel="7.4"))
    assert again["tigerlake"].kernel == "7.4"
    assert again["broadwell_ult"].kernel == "7.3.4"
    table = by_cpu_model.lines(again)
    assert len(table) == 4
    assert sum("7.4" in line for line in table) == 1


def test_parts_of_one_run(record):
    assert record(DOCUMENT, other_cases())["tigerlake"].counts == {"passed": 2, "skipped": 2}


def test_a_matrix(record):
    columns = {"7.3.4 tigerlake": changed(options={}), "7.3.4 arrow_lake": changed(options={})}
    assert set(record({"schema": 1, "columns": columns})) == {"tigerlake", "arrow_lake"}


@pytest.mark.parametrize(
    ("documents", "why"),
    [
        ([changed(complete=False)], "0.json: these results are not complete"),
        ([changed(options={})], "0.json: these results are of no --cpu-model"),
        ([changed(options={"cpu_model": "pentium"})], "0.json: these results are of no --cpu-mod"),
        ([DOCUMENT, DOCUMENT], "1.json: these results are of cases that other results of tigerl"),
        ([DOCUMENT, other_cases(kernel="6.1")], "1.json: these results are of another kernel"),
        ([DOCUMENT, other_cases(emulator="bochs 2.7")], "1.json: these results are of another k"),
    ],
)
def test_results_that_do_not_go_in(record, tmp_path, documents, why):
    with pytest.raises(UsageError, match=why):
        record(*documents)
    assert not (tmp_path / "record.json").exists()


def test_what_is_shipped():
    """Nobody records a model on which a case failed."""
    rows = by_cpu_model.recorded()
    assert rows
    for name, row in rows.items():
        assert row.counts.keys() <= {"passed", "known", "skipped"}, name
    done = emulators("--outcomes")
    assert done.stdout.splitlines() == by_cpu_model.lines(rows)


@pytest.mark.parametrize("content", ["{", '{"schema": 2}', '{"columns": {"tigerlake": {}}}'])
def test_no_results(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    done = emulators("--record", str(tmp_path / "x.json"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
