"""The list of defects found in KVM agrees with the record of deviations and with the suite."""

import json
import re
from pathlib import Path

import pytest

import kvmnest.suite
from kvmnest import found
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError

SUITE = Path(kvmnest.suite.__path__[0])
DEFECTS = found.load()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda each: each.id)
def test_a_defect_is_shown_by_cases(defect):
    """Each case is in the suite, and recorded as KVM's fault on the newest kernel."""
    for case, deviation in zip(defect.cases, defect.deviations(), strict=True):
        assert deviation.emulator == ""
        assert deviation.applies(
            "lab",
            "7.3.4-amd64",
            {k: "Y" if v else "N" for k, v in deviation.params.items()},
            "bochs 3.0",
        )
        file, _, name = case.partition("::")
        function = name.partition("[")[0].rstrip("*")
        assert re.search(rf"^def {function}\(", (SUITE / file).read_text(), re.MULTILINE), case
    assert all(getattr(defect, name) for name in ("title", "seen", "right", "loss", "fix"))


def test_ids_are_unique():
    assert len({defect.id for defect in DEFECTS}) == len(DEFECTS) >= 10


def test_the_verb(capsys):
    assert main(["found"]) == 0
    told = capsys.readouterr().out
    assert all(f"{defect.id}: {defect.title}" in told for defect in DEFECTS)
    assert main(["found", DEFECTS[0].id]) == 0
    told = capsys.readouterr().out
    assert "seen: " in told
    assert "kvmnest run test_" in told
    assert main(["found", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(DEFECTS)
    assert main(["found", "nothing"]) == 2


@pytest.mark.parametrize("text", ["[[defect]]\nid = 1", "junk", "[[defect]]\nid = 'x'\nwhat = 1"])
def test_a_damaged_file(monkeypatch, tmp_path, text):
    (tmp_path / "found.toml").write_text(text)
    monkeypatch.setattr(found, "FILE", tmp_path / "found.toml")
    found.load.cache_clear()
    with pytest.raises(HarnessError, match=r"found\.toml (cannot be used|is no TOML)"):
        found.load()
    found.load.cache_clear()


def test_a_case_that_is_not_recorded(monkeypatch):
    defect = found.Defect(*[""] * 8, cases=("test_vmxon.py::test_a",))
    with pytest.raises(HarnessError, match=r"test_a is not in known\.toml"):
        defect.deviations()
