"""Every verb that prints, with an output that is full, closed, or knows ASCII only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from readers import READERS

KVMNEST = [sys.executable, "-m", "kvmnest"]
#: Verbs that boot nothing; the others print in the same way.
COMMANDS = [
    "list test_vmxon.py",
    "found",
    "repro list",
    "repro show vmx-cpl",
    "diff results results",
    "report results --ktap -",
    "report results --html -",
    "report results --github",
    "caps diff caps.json caps.json",
    "bisect log --state journal",
    "mutants --list",
    "--version",
    "run -k nosuchthing --target lab --kernel nonesuch",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streams")
    text = READERS["results"].whole().replace(b"E why", "E \N{SNOWMAN}".encode())
    (made / "results").write_bytes(text)
    (made / "caps.json").write_bytes(READERS["caps"].whole())
    (made / "journal").write_bytes(READERS["bisect journal"].whole())
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_output(command: str, folder: Path) -> None:
    words = command.split()
    started = []
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    ascii_only = {**environment, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    for name, shell, env in (
        ("full", 'exec "$@" >/dev/full', environment),
        ("closed", 'exec "$@" >&-', environment),
        ("nobody", '"$@" | true; exit "${PIPESTATUS[0]}"', environment),
        ("ascii", 'exec "$@"', ascii_only),
    ):
        argv = ["bash", "-c", shell, "bash", *KVMNEST, *words]
        process = subprocess.Popen(
            argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append((name, process))
    for name, process in started:
        out, told = process.communicate(timeout=120)
        assert b"Traceback" not in told, (name, told)
        assert b"a defect" not in told, (name, told)
        assert b"Exception ignored" not in told, (name, told)
        assert told.count(b"\n") <= 1, (name, told)
        assert out.isascii()
        codes = {"full": (2, 3, 4), "nobody": (0, 2, 4, 141)}.get(name, (0, 2, 4))
        assert process.returncode in codes
