"""What the plugin's tests share: pytest in a process of its own, with this plugin only."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A module that claims to belong to the suite is held to the suite's rules.
SUITE_HEADER = """
import pytest
__name__ = "kvmnest.suite.test_sample"
pytestmark = [pytest.mark.series(3), pytest.mark.sdm("A section")]
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run_pytest(folder: Path, *arguments: str, prefix: tuple[str, ...] = ()):
    command = [*prefix, sys.executable, "-m", "pytest", "-p", "kvmnest.plugin", *arguments]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--color=no"],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )


def run_events(folder: Path, *arguments: str) -> list[dict]:
    """Run with the event stream; returns the events."""
    path = folder / "events"
    path.unlink(missing_ok=True)
    run_pytest(folder, f"--kvmnest-events={path}", *arguments)
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(events: list[dict]) -> dict[str, dict]:
    """Results by the case's name."""
    return {e["id"].rpartition("::")[2]: e for e in events if e["e"] == "result"}
