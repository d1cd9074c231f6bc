"""kvmnest matrix: differences between neighbours, resuming, real kernels in the lab."""

import json

from kvmnest.cli.main import main
from kvmnest.matrix.page import page
from kvmnest.matrix.run import changes, differences


def column(**outcomes):
    return {"cases": [{"id": name, "outcome": outcome} for name, outcome in outcomes.items()]}


def test_changes_between_neighbours():
    documents = {
        "k1": column(a="passed", b="passed"),
        "k2": column(a="passed", b="failed"),
        "k3": column(a="passed", b="failed", c="passed"),
    }
    assert changes(documents) == [
        ("k1", "k2", ["b: passed -> failed"]),
        ("k2", "k3", ["c: - -> passed"]),
    ]
    assert [name for name, _ in differences(documents)] == ["b", "c"]
    text = page({"<k>": column(a="passed"), "k2": column(a="failed")})
    assert "&lt;k&gt;" in text
    assert "a: passed -&gt; failed" in text


def test_two_settings_in_the_lab(tmp_path, capsys):
    arguments = [
        *("matrix", "test_nested_parameter.py", "-k", "off or on_or_hidden or vmx"),
        *("--kernels", "6.1", "--setting", "nested=0", "--state", str(tmp_path / "state")),
        *("--json", str(tmp_path / "m.json"), "--html", str(tmp_path / "m.html")),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "6.1 -> 6.1 nested=0:" in out
    columns = json.loads((tmp_path / "m.json").read_text())["columns"]
    assert list(columns) == ["6.1", "6.1 nested=0"]
    assert all(document["complete"] for document in columns.values())
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("had been run") == 2


def test_a_kernel_that_is_not_there(tmp_path, capsys):
    arguments = ["matrix", "--kernels", "9.9", "--state", str(tmp_path), "test_vmxon.py"]
    assert main(arguments) == 3
    assert "9.9: no kernel 9.9" in capsys.readouterr().out


def test_usage(capsys):
    assert main(["matrix", "--kernels", "6.1", "--jobs", "0"]) == 2
    assert "--jobs" in capsys.readouterr().err
