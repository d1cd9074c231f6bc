"""Cases as people name them on the command line."""

import re

import pytest

from kvmnest.errors import UsageError
from kvmnest.results import names
from kvmnest.results.runner import split_selection


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
        ("test_nothing.py::test_vmresume_of_clear_vmc", "did you mean test_vmresume_of_clear"),
    ],
)
def test_near_names(name, hint):
    with pytest.raises(UsageError, match=re.escape(hint)):
        split_selection([name])
