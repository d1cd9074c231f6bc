"""Results files: that cannot be written, on a full disk, that cannot be read."""

import json
import os
import resource

import pytest
from file_runs import run

from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.reports import jsonfile
from kvmnest.reports.model import Case, Run


@pytest.mark.parametrize("where", ["no/such/folder/out", "."])
def test_unwritable_results_are_an_error_at_the_start(write, tmp_path, where):
    name = write('def test_a(): open("ran", "w")')
    path = tmp_path / where
    with pytest.raises(HarnessError, match="cannot write results to"):
        jsonfile.JsonFile(path).start(Run("kvm"))
    if where != ".":
        with pytest.raises(HarnessError, match="cannot write"):
            run(path, name)
        assert not (tmp_path / "ran").exists()


def test_full_disk_keeps_what_was_written(tmp_path, capsys):

    path = tmp_path / "out.json"
    file, found = jsonfile.JsonFile(path), Run("kvm")
    file.start(found)
    found.cases.append(Case("a", 1, "s", "passed", 0.1))
    file.write(found)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses the write as it does on a full disk, with another errno.
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        found.cases.append(Case("b", 1, "s", "failed", 0.1, "x" * 4096))
        file.write(found)
        file.write(found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [case["id"] for case in json.loads(path.read_text())["cases"]] == ["a"]
    assert file.problem == f"cannot write results to {path}: File too large"
    assert capsys.readouterr().err.count("cannot write") == 1
    assert list(tmp_path.iterdir()) == [path]
    file.write(found)
    assert file.problem == ""
    assert len(json.loads(path.read_text())["cases"]) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot read"),
        ("{", "no JSON"),
        ("[]", "is not a results file of kvmnest run --json: it must be an object"),
        ('{"schema": 2, "cases": []}', "has schema 2, this kvmnest reads schema 1"),
        ('{"schema": 1, "cases": [{"id": "a", "outcome": "great"}]}', "it must have "),
    ],
)
def test_results_that_cannot_be_read(tmp_path, text, complaint):
    path = tmp_path / "in.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KvmnestError, match=complaint):
        jsonfile.load(path)


def test_only_regular_files_are_replaced(tmp_path):
    """Root could replace /dev/null; a link stays one, and its file gets the results."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for where in (pipe, tmp_path):
        with pytest.raises(HarnessError, match="cannot write results to"):
            jsonfile.JsonFile(where)
    assert pipe.is_fifo()
    link, path = tmp_path / "link", tmp_path / "out.json"
    path.write_text("")
    link.symlink_to(path)
    jsonfile.JsonFile(link).start(Run("kvm"))
    assert link.is_symlink()
    assert json.loads(path.read_text())["cases"] == []
