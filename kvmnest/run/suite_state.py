"""The state of the suite, by which results of one suite are told from those of another."""

from __future__ import annotations

from pathlib import Path

import kvmnest
from kvmnest.lab import cache

_PARTS = ("suite", "l1", "vmx", "cases", "kvm", "data/l1.elf", "data/known.toml")


def suite_state() -> str:
    """Name of the present state of the suite and of all that its cases use."""
    base = Path(kvmnest.__file__).parent
    files: list[Path] = []
    for part in _PARTS:
        path = base / part
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return cache.digest([part for f in files for part in (f.relative_to(base), f.read_bytes())])
