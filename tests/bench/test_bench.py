"""kvmnest bench on this machine's /dev/kvm and in the lab; the figures are not judged."""

import json
from pathlib import Path

import pytest

from kvmnest.bench.measure import BARE
from kvmnest.cli.main import main

NESTED = {"entry and exit in a batch", "VMREAD in a list", "VMREAD by itself"}


def test_here_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first.json"
    assert main(["bench", "--json", str(first)]) == 0
    found = json.loads(first.read_text())
    assert next(iter(found["seconds"])) == BARE
    assert {"fresh L1", "reset of L1", "command"} < set(found["seconds"])
    assert all(seconds > 0 for seconds in found["seconds"].values())
    capsys.readouterr()
    found["seconds"] = {name: 1e9 * seconds for name, seconds in found["seconds"].items()}
    first.write_text(json.dumps(found))
    assert main(["bench", "--compare", str(first)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) >= 5
    assert all(line.endswith("0.00 of before") for line in lines)


def test_in_the_lab(tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    assert main(["bench", "--target", "lab", "--json", str(path)]) == 0
    seconds = json.loads(path.read_text())["seconds"]
    assert set(seconds) > NESTED


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 9}', '{"schema": 1, "seconds": {"a": 0}}']
)
def test_damaged_file(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["bench", "--compare", str(path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1
