"""What the readers' tests do not boot or measure."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is booted or measured: the files are what is tried."""
    from readers import FACTS

    from kvmnest.bisect.probe import GOOD, Answer, Question
    from kvmnest.cli import bench
    from kvmnest.fuzz import machines

    class Machine:
        name = "lab"

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, cases: Any, on_event: Any, journal: Path | None) -> str:
            if not cases:
                on_event({"facts": FACTS})
            for number, _ in cases:
                on_event({"start": number})
                on_event({"end": number, "outcome": ["Exit", 18]})
            return ""

    def unforeseen(error: BaseException) -> int:
        raise error

    measured = {"schema": 1, "kernel": "6.1", "cpu": "x", "seconds": {"a": 1.0}}
    monkeypatch.setattr(machines, "LabMachine", Machine)
    monkeypatch.setattr(bench, "_here", lambda options: measured)
    monkeypatch.setattr(Question, "ask", lambda *_: Answer(GOOD, "passed"))
    monkeypatch.setattr("kvmnest.bisect.over.package_version", lambda name: "")
    monkeypatch.setattr("kvmnest.cli.main._unforeseen", unforeseen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
