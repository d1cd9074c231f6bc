"""What a case says or writes must not damage the reports."""

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from file_runs import run

from kvmnest.reports import html, jsonfile, ktap

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)

    def writer(text):
        (tmp_path / "test_sample.py").write_text("import os\nimport pytest\n" + text)
        return "test_sample.py"

    return writer


SURROGATES = r"""
def test_fail(): pytest.fail("bad \ud800 text")
def test_assert(): assert "\udc80" == "x"
def test_raise(): raise ValueError("\ud800\udfff")
def test_skip(): pytest.skip("no \udfff")
@pytest.mark.parametrize("x", [pytest.param(1, id="a\ud800b")])
def test_id(x): assert x == 2
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_text_that_cannot_be_written(write, tmp_path, encoding):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    code, found = run(tmp_path / "out", write(SURROGATES), screen=screen)
    assert code == 1
    assert sorted(case.outcome for case in found.cases) == [*["failed"] * 4, "skipped"]
    screen.seek(0)
    shown = screen.read()
    assert r"bad \ud800 text" in shown
    assert "4 failed, 1 skipped" in shown
    document = json.loads((tmp_path / "out.json").read_text())
    read = jsonfile.run_of(document)
    for text in ("\n".join(ktap.lines(read)), html.page(read)):
        assert rb"bad \ud800 text" in text.encode()
    failure = ET.parse(tmp_path / "out.xml").getroot().find(".//failure")
    assert r"bad \ud800 text" in failure.text


GARBAGE = {
    "no JSON": b"hello\n",
    "no object": b"5\n",
    "a list": b"[[[[1]]]]\n",
    "deep": b"[" * 100_000 + b"\n",
    "no kind": b'{"a": 1}\n',
    "a kind that is not a text": b'{"e": {}}\n',
    "unknown": b'{"e": "kernel", "text": 5}\n',
    "no bytes of UTF-8": b'{"e": "\xff"}\n',
    "a result without an id": b'{"e": "result"}\n',
    "a result of another case": json.dumps(
        {"e": "result", "id": "x", "series": None, "sdm": None, "outcome": "passed",
         "seconds": 1, "detail": ""}).encode() + b"\n",
    "an outcome that there is not": json.dumps(
        {"e": "result", "id": "test_sample.py::test_b", "series": None, "sdm": None,
         "outcome": "fine", "seconds": 1, "detail": ""}).encode() + b"\n",
    "a second start": b'{"e": "start", "id": "x", "series": null, "sdm": null}\n',
    "half a line": b'{"e": "start"',
}  # fmt: skip


@pytest.mark.parametrize("what", GARBAGE)
def test_a_case_that_writes_garbage_to_the_channel(write, tmp_path, what):
    text = f"""
def test_a(): assert 1
def test_b(pytestconfig):
    fd = int(pytestconfig.getoption("--kvmnest-events").partition(":")[2])
    os.write(fd, {GARBAGE[what]!r})
def test_c(): assert 1
"""
    code, found = run(tmp_path / "out", write(text))
    assert code == 3
    ended = {case.id.partition("::")[2]: case.outcome for case in found.cases}
    assert ended == {"test_a": "passed", "test_b": "error", "test_c": "passed"}
    lost = found.cases[1].summary
    assert lost.startswith("crashed: ")
    assert len(lost) < 400
