"""What the emulator's process looks like from outside."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvmnest.lab.machine import Lab


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


@dataclass
class Seen:
    """What came out of a guest; ``sockets`` are those of its emulator on which one could call."""

    code: int = -1
    events: list[bytes] = field(default_factory=list)
    out: bytes = b""
    err: bytes = b""
    sockets: list[str] = field(default_factory=list)


def watch(lab: Lab, command: str, emulator: Callable[[int], int]) -> Seen:
    """Run Python code with an environment and a file from the host; watch all that it says."""
    seen = Seen()

    def take_event(line: bytes) -> None:
        seen.events.append(line)
        seen.sockets.extend(listening(emulator(os.getpid())))

    def take_output(data: bytes) -> None:
        seen.out += data

    def take_error(data: bytes) -> None:
        seen.err += data

    seen.code = lab.run(
        ["python3", "-c", command],
        on_event=take_event,
        on_output=take_output,
        on_error=take_error,
        env={"EXTRA": "from the host"},
        files={"/root/extra": b"a file"},
    )
    return seen


def gone(pid: int, wait: float = 10.0) -> bool:
    limit = time.monotonic() + wait
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}/exe").exists()
