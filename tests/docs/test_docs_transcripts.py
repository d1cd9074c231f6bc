"""Transcripts are what the commands print, and one that is out of date is noticed."""

import subprocess
import sys
from pathlib import Path

import kvmnest

SCRIPT = Path(kvmnest.__file__).parent / "docs" / "extension" / "transcripts.py"
PAGE = "before\n\n% transcript: kvmnest --version\n```console\nold\n```\nafter\n"


def transcripts(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_page_is_renewed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert transcripts("--check", str(page)).returncode == 1
    assert page.read_text() == PAGE
    assert transcripts(str(page)).returncode == 0
    shown = f"$ kvmnest --version\nkvmnest {kvmnest.__version__}\n"
    assert page.read_text() == PAGE.replace("old\n", shown)
    assert transcripts("--check", str(page)).returncode == 0


def test_a_command_that_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("--version", "nonsense"))
    assert transcripts(str(page)).returncode == 3
    assert "old" in page.read_text()


def test_pages_have_transcripts() -> None:
    """The blocks are found: none is empty, each shows its command."""
    pages = SCRIPT.parents[1].rglob("*.md")
    marked = [line for page in pages for line in page.read_text().splitlines()]
    commands = [line.partition(": ")[2] for line in marked if line.startswith("% transcript: ")]
    assert len(commands) >= 2
    assert all(f"$ {command}" in marked for command in commands)
