"""The Pythons of this machine that kvmnest is meant for."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13")


def _candidates(version: str) -> Iterator[str]:
    """KVMNEST_TEST_PYTHONS (paths, with colons between them), PATH, then pyenv's."""
    yield from filter(None, os.environ.get("KVMNEST_TEST_PYTHONS", "").split(":"))
    name = f"python{version}"
    for folder in os.environ.get("PATH", "").split(":"):
        yield str(Path(folder) / name)
    root = _pyenv_root()
    if root is not None:
        yield from (str(found) for found in sorted(root.glob(f"versions/{version}.*/bin/{name}")))


@functools.cache
def _pyenv_root() -> Path | None:
    if os.environ.get("PYENV_ROOT"):
        return Path(os.environ["PYENV_ROOT"])
    pyenv = shutil.which("pyenv")
    if pyenv is None:
        return Path.home() / ".pyenv"  # where pyenv is if nobody said otherwise
    done = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


@functools.cache
def find(version: str) -> str | None:
    """A Python of this version that can make virtual environments."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in _candidates(version):
        if os.access(candidate, os.X_OK):
            done = subprocess.run(
                [candidate, "-c", code], capture_output=True, text=True, check=False
            )
            # pyenv's shims are there for versions that are not.
            if done.stdout.strip() == version:
                return candidate
    return None
