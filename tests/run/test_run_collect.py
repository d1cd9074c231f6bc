"""What the host's pytest compiled for the lab, damaged: it is compiled anew, with one line."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from damages import cut, empty, junk, zero

from kvmnest.run.collect import collect
from kvmnest.run.selection import Selection, pytest_arguments

_HEADER = 16  # bytes that say from what it was compiled


def junk_behind_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:_HEADER] + b"\xff" * 99)


def no_code(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:_HEADER] + b"N")


DAMAGES = {
    "all": (zero, cut, empty, junk, junk_behind_the_header, no_code),
    "cut": (cut,),
    "zero": (zero,),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_code(own_cache: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    arguments = pytest_arguments(Selection(), "lab", ["kvmnest.suite.test_smm"], [])
    count = collect(arguments).count
    assert count > 0
    damages: itertools.cycle[Callable[[Path], None]] = itertools.cycle(DAMAGES[name])
    files = sorted((own_cache / "pycache").rglob("*.pyc"))
    assert len(files) > 20
    for path, damage in zip(files, damages, strict=False):
        damage(path)
    again = collect(arguments)
    assert (again.count, bool(again.plan)) == (count, True)
    # Python sees by itself that a file of zeros is none of its own.
    told = "" if name == "zero" else f"kvmnest: {own_cache}/pycache is damaged or old, and made"
    assert capfd.readouterr().err.startswith(told)
    assert collect(arguments).count == count
    assert capfd.readouterr().err == ""


def test_a_broken_suite_is_not_taken_for_damage(
    own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = pytest_arguments(Selection(), "lab", ["kvmnest.suite.test_nosuch"], [])
    for _ in range(2):
        assert not collect(arguments).count
    assert capfd.readouterr().err == ""
