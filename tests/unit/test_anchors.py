"""The record of what other suites assert."""

import fnmatch
import json
import re

import pytest

from kvmnest import anchors
from kvmnest.cli.main import main
from kvmnest.run.names import functions

CASES = {f"{file}::{name}" for name, files in functions().items() for file in files}


@pytest.mark.parametrize("row", anchors.rows(), ids=lambda row: row.test)
def test_the_cases_of_a_row_exist(row):
    for pattern in row.cases:
        assert fnmatch.filter(CASES, pattern), pattern
    assert row.cases or row.missing


def test_each_test_stands_once():
    names = [(row.suite, row.test) for row in anchors.rows()]
    assert len(names) == len(set(names))


def test_listed(capsys):
    assert main(["list", "--against", "kvm-unit-tests"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"kvm-unit-tests: \d+ tests: \d+ full, \d+ partly, \d+ no", out[-1])
    states = [line.split()[0] for line in out[:-1] if not line.startswith(" ")]
    assert states == sorted(states, key=["no", "partly", "full"].index)
    assert main(["list", "--against", "kvm-unit-tests", "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} >= {"partly", "no"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--against", "x"], "kvm-unit-tests"), (["--against", "XTF", "-k", "a"], "with --json only")],
)
def test_refused(capsys, arguments, told):
    assert main(["list", *arguments]) == 2
    assert told in capsys.readouterr().err
