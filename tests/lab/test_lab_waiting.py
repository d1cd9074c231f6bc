"""What takes long says so, once, and not when it is cached."""

import pytest

from kvmnest.lab import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _build(folder):
    (folder / "made").write_text("x")


@pytest.mark.parametrize("kind", ["kernel-sources", "kvm-trees"])
def test_a_long_wait_is_announced_once(kind, capsys):
    cache.entry(kind, "key", _build)
    told = capsys.readouterr().err
    assert told.startswith("kvmnest: ")
    assert told.count("\n") == 1
    assert " s" in told or "minute" in told
    cache.entry(kind, "key", _build)
    assert capsys.readouterr().err == ""


def test_a_short_one_is_not(capsys):
    cache.entry("modules", "key", _build)
    assert capsys.readouterr().err == ""
