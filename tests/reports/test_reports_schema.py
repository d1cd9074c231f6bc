"""Results follow the published JSON Schema, and what does not is refused by it."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

import kvmnest
from kvmnest.cli.main import main

SCHEMA = json.loads((Path(kvmnest.__file__).parent / "data" / "results.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("schema") / "results.json"
    selected = ["-j", "1", "test_vmfunc.py"]
    assert main(["run", "--target", "lab", "-q", "--json", str(path), *selected]) == 0
    return json.loads(path.read_text())


def test_schema_itself() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_results_of_the_lab(results: dict) -> None:
    assert results["cases"]
    VALIDATOR.validate(results)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("cases"),
        lambda d: d.update(schema=99),
        lambda d: d["cases"][0].update(outcome="fine"),
        lambda d: d["cases"][0].pop("id"),
        lambda d: d.update(complete="yes"),
    ],
)
def test_damaged_results(results: dict, damage) -> None:
    broken = copy.deepcopy(results)
    damage(broken)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(broken)


def test_pages_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--html and --ktap are written at the end; an unwritable place is found at once."""
    page, ktap = tmp_path / "r.html", tmp_path / "r.ktap"
    arguments = ["run", "--target", "lab", "-q", "-j", "1", "test_vmfunc.py"]
    assert main([*arguments, "--html", str(page), "--ktap", str(ktap)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert ktap.read_text().startswith("KTAP version 1\n")
    assert "test_vmfunc" in page.read_text()
    capsys.readouterr()
    assert main([*arguments, "--html", str(tmp_path / "no" / "r.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
