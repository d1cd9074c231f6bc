"""Cases as people name them on the command line."""

import json
import re

import pytest

from kvmnest.cli.main import main
from kvmnest.errors import UsageError
from kvmnest.run import names
from kvmnest.run.selection import split_selection


def test_a_function_alone():
    name = "test_vmresume_of_clear_vmcs"
    expected = f"kvmnest.suite.test_vmlaunch_vmresume::{name}"
    assert split_selection([name]) == ([expected], [])
    assert split_selection([f"{name}[x::y]"]) == ([f"{expected}[x::y]"], [])


def test_a_file_comes_before_a_function():
    assert split_selection(["test_vmxon"]) == (["kvmnest.suite.test_vmxon"], [])


def test_a_file_of_the_user_comes_before_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_vmresume_of_clear_vmcs").write_text("")
    assert split_selection(["test_vmresume_of_clear_vmcs"]) == ([], ["test_vmresume_of_clear_vmcs"])


def test_a_function_of_several_files():
    name, files = next(item for item in names.functions().items() if len(item[1]) > 1)
    with pytest.raises(UsageError, match=re.escape(f"{name} is in several files: {files[0]}")):
        split_selection([name])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("test_vmresume_of_clear_vmcss", "did you mean test_vmresume_of_clear_vmcs"),
        ("test_vmxonn.py", "did you mean test_vmxon"),
        ("nothing", "kvmnest list shows all"),
        ("test_vmxon.py::test_vmxon_enters_vmx", "did you mean test_vmxon_enters_vmx_operation"),
        ("test_vmxon.py::test_vmresume_of_clear_vmcs", "is in test_vmlaunch_vmresume.py)"),
        ("test_nothing.py::test_vmresume_of_clear_vmc", "did you mean test_vmresume_of_clear"),
    ],
)
def test_near_names(name, hint):
    with pytest.raises(UsageError, match=re.escape(hint)):
        split_selection([name])


def test_every_case_is_one(capsys):
    """A case of a class, with parameters, of an imported function: what list shows can be run."""
    assert main(["list", "--json"]) == 0
    for case in json.loads(capsys.readouterr().out):
        file, _, name = case["id"].partition(".py")
        assert names.is_case(file, name), case["id"]


IN_LAB = ["run", "--target", "lab", "-j1"]
NOTHING = [
    (["list", "-k", "nosuchthing"], 4, "no case matches -k 'nosuchthing'; kvmnest list shows"),
    ([*IN_LAB, "-k", "nosuchthing"], 4, "no case matches -k 'nosuchthing'; kvmnest list shows"),
    ([*IN_LAB, "-m", "nosuchmark", "test_vmxon"], 4, "no case matches test_vmxon -m 'nosuchmark'"),
    ([*IN_LAB, "--deselect", "test_vmxon.py", "test_vmxon.py"], 4, "no case matches test_vmxon.py"),
    ([*IN_LAB, "test_vpid.py::test_two_guests[nosuch]"], 2, "not found: "),
    ([*IN_LAB, "-k", "not ("], 2, "Wrong expression passed to '-k'"),
    (["matrix", "--kernels", "6.1", "-k", "nosuchthing"], 4, "no case matches -k 'nosuchthing'"),
]


@pytest.mark.parametrize(("words", "code", "text"), NOTHING, ids=lambda value: str(value)[:60])
def test_a_selection_that_leaves_nothing(words, code, text, own_cache, tmp_path, capsys):
    """What to do stands there. No kernel is named, and none is fetched."""
    if words[0] == "run":
        words += ["--json", str(tmp_path / "out.json")]
    assert main(words) == code
    told = capsys.readouterr()
    assert text in told.err
    assert told.err.startswith("kvmnest: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (own_cache / "archive").exists()
    assert not (own_cache / "kernels").exists()
    if words[0] == "run" and code == 4:
        assert json.loads((tmp_path / "out.json").read_text())["cases"] == []


def test_list_is_a_table(capsys):
    assert main(["list", "test_vmxon.py", "test_ept_violation.py", "--needs", "ept"]) == 0
    head, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "PATCH"
    starts = [head.index(word) for word in ("HERE", "CASE", "SDM SECTION", "NEEDS")]
    assert len(rows) > 5
    for row in rows:
        assert all(row[at - 2 : at] == "  " and row[at] != " " for at in starts), row
        assert "EPT" in row[starts[-1] :]
    assert main(["list", "test_vmxon.py", "--needs", "nosuch"]) == 4
    assert "no case matches test_vmxon.py --needs nosuch" in capsys.readouterr().err


def test_trace_looks_at_the_name_first(own_cache, capsys):
    """Not even the lists of packages are fetched for a case that is none."""
    for name in ("test_vmxon.py::test_vmx", "test_vmx", "test_vmxon.py"):
        assert main(["trace", "--target", "lab", "--kernel", "6.1", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (own_cache / "archive").exists()


def test_the_name_of_a_script_that_lies_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_bug.py").write_text("raise SystemExit('executed')\n")
    assert main(["repro", "my-bug"]) == 2
    assert "kvmnest repro ./my_bug.py" in capsys.readouterr().err
    assert main(["repro", "vmx-cp"]) == 2
    assert "did you mean vmx-cpl?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["import no_such_module", "def (:"])
@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "-k", "vmxon"], ["run", "--target", "lab", "-k", "vmxon"]]
)
def test_a_conftest_that_cannot_be_loaded(arguments, text, tmp_path, monkeypatch, capsys):
    """pytest also loads the conftest.py of a folder tests: that it cannot is no empty selection."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(text)
    assert main(arguments) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"kvmnest: cannot load .*tests/conftest\.py: (Module|Syntax)\w*Error: ", said)
