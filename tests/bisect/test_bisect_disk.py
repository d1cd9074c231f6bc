"""What is written is on the disk before anything is done about it."""

import os
from pathlib import Path

import pytest

from kvmnest.bisect import disk
from kvmnest.errors import HarnessError


@pytest.fixture
def calls(monkeypatch):
    """Names of what reaches the disk, in that order."""
    seen = []

    def noted(name, real):
        def call(*arguments, **more):
            if name == "sync":
                target = os.readlink(f"/proc/self/fd/{arguments[0]}")
                seen.append(f"sync {os.path.basename(target)}")
            else:
                seen.append(name)
            return real(*arguments, **more)

        return call

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace))
    return seen


def test_a_file_is_replaced_as_a_whole(tmp_path, calls):
    path = tmp_path / "state"
    disk.replace(path, "one")
    assert calls == ["sync .state.new", "rename", f"sync {tmp_path.name}"]
    assert path.read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o600
    disk.replace(path, "two", 0o644)
    assert path.read_text() == "two"
    assert [name.name for name in tmp_path.iterdir()] == ["state"]


def test_lines_are_appended(tmp_path, calls):
    path = tmp_path / "steps"
    disk.append(path, {"a": 1})
    assert calls == ["sync steps", f"sync {tmp_path.name}"]
    calls.clear()
    disk.append(path, {"b": 2})
    assert calls == ["sync steps"]
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'
    disk.remove(path)
    disk.remove(path)
    disk.remove(tmp_path / "no" / "folder")
    assert not path.exists()


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(HarnessError, match="cannot write /dev/full: No space left on device"):
        disk.append(Path("/dev/full"), {"a": 1})
    with pytest.raises(HarnessError, match=r"cannot write .*: No such file or directory"):
        disk.replace(tmp_path / "no" / "folder", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HarnessError, match="cannot remove"):
        disk.remove(tmp_path / "folder")
