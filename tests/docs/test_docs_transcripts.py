"""Transcripts are what the commands print, and one that is out of date is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvmnest

SCRIPT = Path(kvmnest.__file__).parent / "docs" / "extension" / "transcripts.py"
sys.path.insert(0, str(SCRIPT.parent))
from transcripts import _SECONDS, parse  # noqa: E402
from transcripts import transcripts as read  # noqa: E402

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


def test_options(tmp_path: Path) -> None:
    """An exit code is demanded and shown, long output is cut, seconds and home are not shown."""
    page = tmp_path / "page.md"
    block = "```console\n```\n"
    page.write_text(
        f"% transcript exit=2: kvmnest diff gone.json gone.json\n{block}"
        f"% transcript head=1 tail=2: kvmnest --help\n{block}"
    )
    assert transcripts(str(page)).returncode == 0
    shown = page.read_text().splitlines()
    assert shown[2].startswith("$ kvmnest diff")
    assert shown[3].startswith("kvmnest: ")
    assert shown[4:7] == ["$ echo $?", "2", "```"]
    cut = shown[7:]
    assert [cut[2], cut[4]] == ["$ kvmnest --help", "..."]
    assert len(cut) == 8
    page.write_text(page.read_text().replace("exit=2", "exit=1"))
    assert transcripts(str(page)).returncode == 3


def test_seconds_are_left_out() -> None:
    transcript = parse("times=no head=3", "kvmnest run")
    assert (transcript.times, transcript.head, transcript.exit_code) == (False, 3, 0)
    assert _SECONDS.sub("N s", "3 passed in 12.3 s (lab, 6.1.0-56 s390)") == (
        "3 passed in N s (lab, 6.1.0-56 s390)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "% transcript: kvmnest list\n\n```console\n```\n",
        "% transcript kvmnest list\n```console\n```\n",
        "% transcript colour=red: kvmnest list\n```console\n```\n",
        "% transcript: ls\n```console\n```\n",
    ],
)
def test_a_broken_transcript_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    done = transcripts(str(page))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert page.read_text() == text


def test_pages_have_transcripts() -> None:
    """Those of all pages can be read; each shows its command, something, and its exit code."""
    verbs = set()
    for page in SCRIPT.parents[1].rglob("*.md"):
        for transcript, shown in read(page.read_text()):
            lines = shown.splitlines()
            assert lines[0] == f"$ {transcript.command}", page
            assert len(lines) > 1, page
            if transcript.exit_code:
                assert lines[-2:] == ["$ echo $?", str(transcript.exit_code)], page
            verbs.add(transcript.command.split()[1])
    assert {"run", "diff", "report", "list", "caps", "kernels", "fuzz", "trace"} <= verbs
