"""Damaged files for everything that reads one: no traceback, no hang, no undocumented exit code.

``KVMNEST_DAMAGED_FILES=10000`` tries so many instead of 2,400; 10,000 take some minutes.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from damage import content, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS

TRIED = int(os.environ.get("KVMNEST_DAMAGED_FILES", "2400"))
LONGEST = 10  # seconds for one file

pytestmark = pytest.mark.usefixtures("stand_ins")


@contextmanager
def deadline() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no end within {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_whole_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read: else their damaged versions would show nothing."""
    reader = READERS[name]
    path = tmp_path / reader.name
    path.write_bytes(reader.whole())
    (tmp_path / "good.json").write_bytes(reader.whole())
    getattr(reader.use, "read", reader.use)(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = READERS[name]
    path = tmp_path / reader.name
    whole = reader.whole()
    is_json = whole[:1] in (b"{", b"[")

    @settings(
        max_examples=max(1, TRIED // len(READERS)),
        database=None,
        # The same ones each time in CI; others where many are tried.
        derandomize="KVMNEST_DAMAGED_FILES" not in os.environ,
        suppress_health_check=[*HealthCheck],
    )
    @given(files(whole) if is_json else st.one_of(content(whole), st.binary(max_size=99)))
    def tried(content: bytes) -> None:
        path.write_bytes(content)
        (tmp_path / "good.json").write_bytes(whole)
        with deadline():
            reader.use(path)
        # An error is one line; that a journal was cut is another.
        assert capsys.readouterr().err.count("\n") <= 4

    tried()
