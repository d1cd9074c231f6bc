"""A git history of small numbered commits, quick to build and to judge."""

import subprocess

import pytest
from reboot_scratch import make_root

COMMITS = 16


def call(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def git_call():
    return call


@pytest.fixture
def history(tmp_path):
    """A work tree on branch topic; the file "number" of commit N holds N."""
    folder = tmp_path / "tree"
    folder.mkdir()
    call(folder, "init", "-q", "-b", "topic")
    for number in range(COMMITS):
        (folder / "number").write_text(f"{number}\n")
        call(folder, "add", "-A")
        call(folder, "commit", "-q", "-m", f"change {number}")
    return folder


@pytest.fixture
def root(tmp_path):
    """The root of a system that can be bisected by restarts."""
    return make_root(tmp_path)
