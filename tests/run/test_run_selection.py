"""The options of ``kvmnest run`` that choose cases and stop early, as pytest has them."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvmnest.cli import run as verb
from kvmnest.cli.main import main
from kvmnest.run import last_failed

ROOT = str(Path(__file__).resolve().parents[2])
SAMPLE = """
import pytest
def test_a(): assert 1
def test_b(): assert 0
class TestC:
    @pytest.mark.sdm("x")
    def test_c(self): assert 0
@pytest.mark.sdm("x")
def test_d(): assert 1
"""


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Runs the sample with options: (exit code, {case: outcome}, document)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verb, "require_kvm", lambda: None)  # no case of the sample uses it
    (tmp_path / "test_sample.py").write_text(SAMPLE)

    def run(*options, selected=("test_sample.py",)):
        code = main(["run", "--target", "kvm", "--json", "o.json", "--junit", "o.xml",
                     *options, *selected])  # fmt: skip
        document = json.loads(Path("o.json").read_text())
        ran = {case["id"].rpartition("::")[2]: case["outcome"] for case in document["cases"]}
        return code, ran, document

    return run


A, B, C, D = ("test_a", "passed"), ("test_b", "failed"), ("test_c", "failed"), ("test_d", "passed")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [A, B, C, D]),
        (("-k", "test_b or TestC"), [B, C]),
        (("-m", "sdm"), [C, D]),
        (("-m", "not sdm"), [A, B]),
        (("--deselect", "test_sample.py::TestC"), [A, B, D]),
        (("--deselect", "test_sample.py::test_b", "--deselect", "test_sample.py::test_d"), [A, C]),
    ],
)
def test_chosen(sample, options, expected):
    assert sample(*options)[1] == dict(expected)


def test_one_of_a_file(sample):
    assert sample(selected=["test_sample.py::TestC::test_c"])[1] == dict([C])


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("-x",), [A, B]), (("--maxfail", "2"), [A, B, C]), (("--maxfail=3",), [A, B, C, D])],
)
def test_stops_as_asked(sample, capsys, options, expected):
    code, ran, document = sample(*options)
    assert (code, ran) == (1, dict(expected))
    stopped = document.get("stopped", "")
    assert bool(stopped) == bool(document["not_run"]) == (len(expected) < 4)
    assert stopped in capsys.readouterr().out
    # It was wanted: no problem, and no further error in JUnit.
    assert document["problems"] == []
    assert ET.parse("o.xml").getroot().get("errors") == "0"


def test_last_failed(sample, capsys):
    assert sample("-x")[1] == dict([A, B])
    assert sample("--lf")[1] == dict([B])
    assert sample()[1] == dict([A, B, C, D])
    assert sample("--lf")[1] == dict([B, C])
    assert sample("--lf", selected=["test_sample.py::TestC"])[1] == dict([C])
    text = Path("test_sample.py").read_text().replace("assert 0", "assert 1")
    Path("test_sample.py").write_text(text)
    assert sample("--lf")[1] == {"test_b": "passed", "test_c": "passed"}
    capsys.readouterr()
    assert len(sample("--lf")[1]) == 4
    assert "--lf: none of these failed the last time" in capsys.readouterr().out


def test_last_failed_of_files_below_this_folder(sample, monkeypatch):
    """Without names, --lf means the files of this folder too."""
    here = Path.cwd()
    assert sample("-x")[1] == dict([A, B])
    assert last_failed.among([]) == [f"{here}/test_sample.py::test_b"]
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert last_failed.among([]) == []


def test_last_failed_of_a_case_that_is_gone(sample):
    assert sample()[0] == 1
    text = Path("test_sample.py").read_text().replace("def test_b", "def test_other")
    Path("test_sample.py").write_text(text)
    assert sample("--lf")[1] == dict([C])


def test_last_failed_of_another_folder(sample, tmp_path, monkeypatch):
    """The same relative name means another file there."""
    assert sample()[0] == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "test_sample.py").write_text("def test_b(): pass\ndef test_d(): pass\n")
    monkeypatch.chdir(other)
    assert sample("--lf")[:2] == (0, {"test_b": "passed", "test_d": "passed"})


@pytest.mark.parametrize(
    "name",
    [
        "test_m.py::test_a",
        "test_vpid.py::test_gone[x]",
        "test_vpid.py::test_two_guests[gone]",
        "/nowhere/test_m.py::test_a",
        "x",
        "",
    ],
)
def test_last_failed_of_a_suite_that_has_no_such_case(tmp_path, monkeypatch, name):
    """What an older version, or another folder, left in the memory is no reason to stop."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "kvmnest"
    folder.mkdir(parents=True)
    good = "test_vpid.py::test_two_guests[no-vpid-no-ept]"
    (folder / "last-failed.json").write_text(json.dumps([name, good]))
    assert last_failed.among([]) == [good]
    assert last_failed.among(["test_two_guests"]) == [good]
    assert last_failed.among(["test_vmxon.py"]) == []


@pytest.mark.parametrize("text", [b"", b"[", b"{}", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_memory_of_failures(sample, tmp_path, text):
    folder = tmp_path / "cache" / "kvmnest"
    folder.mkdir(parents=True)
    (folder / "last-failed.json").write_bytes(text)
    assert len(sample("--lf")[1]) == 4
    assert len(sample("--lf")[1]) == 2


def test_told(sample, capsys):
    sample("-v", "--durations", "2")
    out = capsys.readouterr().out
    assert "passed test_sample.py::test_a (" in out
    assert "FAILED test_sample.py::test_b" in out
    assert "slowest 2 cases:" in out


@pytest.mark.parametrize("option", ["--maxfail", "--durations"])
def test_negative(option, capsys):
    assert main(["run", option, "-1"]) == 2
    assert "must not be negative" in capsys.readouterr().err
