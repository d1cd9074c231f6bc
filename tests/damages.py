"""What a crashed host or a full disk makes of a file."""

import os
from pathlib import Path


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def junk(path: Path) -> None:
    path.write_bytes(b"\xff\xfejunk\x00" * 9)
