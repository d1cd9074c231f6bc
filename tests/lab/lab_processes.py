"""What the emulator's process looks like from outside."""

import contextlib
import os
import time
from pathlib import Path


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(status.parent.name))
    return found


def emulator_of(pid: int, name: str, wait: float = 30.0) -> int:
    """The child called ``name`` (15 characters at most) in a folder of the lab."""
    limit = time.monotonic() + wait
    while time.monotonic() < limit:
        for child in children_of(pid):
            with contextlib.suppress(OSError):
                comm = Path(f"/proc/{child}/comm").read_text().strip()
                folder = Path(os.readlink(f"/proc/{child}/cwd")).name
                if comm == name and folder.startswith("kvmnest-lab-"):
                    return child
        time.sleep(0.05)
    raise AssertionError(f"no process {name} appeared")


def listening(pid: int) -> list[str]:
    """Sockets of a process on which somebody could call."""
    inodes = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "unix"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            inodes.add(fields[6] if table == "unix" else fields[9])
    targets = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return [t for t in targets if t.startswith("socket:") and t[8:-1] in inodes]


def gone(pid: int, wait: float = 10.0) -> bool:
    limit = time.monotonic() + wait
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}/exe").exists()
