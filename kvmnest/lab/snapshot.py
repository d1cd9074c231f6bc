"""Snapshots of a running emulator process: boot once, continue many times.

Bochs' own save and restore does not survive a Linux guest, so the whole process is saved: its
writable memory and registers. To continue, a new Bochs is started with the same configuration
and without address randomisation, so that everything lies at the same addresses; its ROM waits
with all files open, and its memory is replaced. Every assumption is checked (mapped files,
addresses, open files); if one does not hold the caller boots from cold.
"""

import contextlib
import ctypes
import errno
import functools
import marshal
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest.lab import tools
from kvmnest.lab.ptrace import Stopped

PAGE = 4096
ADDR_NO_RANDOMIZE = 0x0040000  # a flag of personality(2)
_CHUNK = 1 << 20
_NR_OPEN, _NR_CLOSE, _NR_MMAP, _NR_BRK, _NR_DUP2 = 2, 3, 9, 12, 33
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x02, 0x10, 0x20
_KERNEL_OWNED = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")


class SnapshotError(Exception):
    """This process cannot be saved, or this snapshot does not fit; not an error of the lab."""


@dataclass(frozen=True)
class Region:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    perms: str
    offset: int
    name: str

    @property
    def saved(self) -> bool:
        """Whether its content belongs to the process alone and can differ."""
        return "w" in self.perms and self.name not in _KERNEL_OWNED


def regions(pid: int) -> list[Region]:
    """The mappings of a process."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, perms, offset, _, _, *name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        found.append(Region(start, end, perms, int(offset, 16), name[0] if name else ""))
    return found


def _fixed(found: list[Region]) -> list[tuple[object, ...]]:
    """What must be equal in both processes: code, constants, and where the kernel put things."""
    stamps: dict[str, tuple[int, int]] = {}
    fixed: list[tuple[object, ...]] = []
    for region in found:
        # Writable ones are replaced, in a process that was itself resumed by another file's.
        if region.name.startswith("/") and not region.saved:
            if region.name not in stamps:
                status = os.stat(region.name)
                stamps[region.name] = (status.st_size, status.st_mtime_ns)
            fixed.append(
                (region.start, region.end, region.perms, region.name, *stamps[region.name])
            )
        elif region.name == "[stack]":
            fixed.append((region.end, region.name))
        elif region.name in _KERNEL_OWNED:
            fixed.append((region.start, region.end, region.name))
    return fixed


def _open_files(pid: int) -> list[tuple[int, str]]:
    """Open descriptors with what they are, without the part of the name that differs."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        kind = re.sub(r"\d+", "N", target) if target.startswith("/dev/") else Path(target).name
        found.append((int(fd.name), kind))
    return sorted(found)


@functools.cache
def supported() -> bool:
    """Whether this system lets us stop a child process and fix its addresses.

    Containers often forbid one of the two; then every boot is a cold one.
    """
    libc = ctypes.CDLL(None)

    def setup() -> None:
        if libc.personality(ADDR_NO_RANDOMIZE) == -1:
            os._exit(1)

    try:
        child = tools.start(["sleep", "60"], setup)
    except OSError:
        return False
    try:
        with Stopped(child.pid) as process:
            process.extended_state()
            return "[stack]" in {region.name for region in regions(child.pid)}
    except OSError:
        return False
    finally:
        child.kill()
        child.wait()


def capacity(pages: int) -> int:
    """Bytes that a mailbox of so many pages takes."""
    return (pages - 1) * PAGE


def find_page(pid: int, mark: bytes) -> int:
    """Address of the first page of process ``pid`` that begins with ``mark``.

    Raises SnapshotError if there is none, OSError if the process cannot be read.
    """
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for region in regions(pid):
            if not region.saved:
                continue
            for start in range(region.start, region.end, _CHUNK):
                with contextlib.suppress(OSError):  # memory of devices
                    chunk = os.pread(memory.fileno(), min(_CHUNK, region.end - start), start)
                    at = chunk.find(mark)
                    while at >= 0:
                        if (start + at) % PAGE == 0:
                            return start + at
                        at = chunk.find(mark, at + 1)
    raise SnapshotError("the guest's memory was not found in the emulator")


def find_mailbox(pid: int, mark: bytes, pages: int) -> list[int]:
    """Where the guest's mailbox lies in process ``pid``, which runs on: address by page.

    ``mark`` and a 4-byte index begin each of its ``pages`` pages. Raises SnapshotError if they
    are not there, OSError if the process cannot be read.
    """
    copy = _Copy(mark)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for region in regions(pid):
            # What another thread unmaps in between, and memory of devices, is not the guest's.
            with contextlib.suppress(OSError):
                copy.run(memory.fileno(), -1, [region] if region.saved else [])
    return copy.by_index(pages)


def take(pid: int, folder: Path, mark: bytes, pages: int) -> list[int]:
    """Save process ``pid`` into ``folder`` and let it run on.

    Returns where the guest's mailbox lies, as ``find_mailbox`` does. Raises SnapshotError, and
    OSError if ``folder``'s disk is full: the process runs on.
    """
    try:
        with Stopped(pid) as process:
            if len(os.listdir(f"/proc/{pid}/task")) != 1:
                raise SnapshotError("the emulator has several threads")
            process.leave_system_call()
            found = regions(pid)
            saved = [region for region in found if region.saved]
            if any(region.perms[3] == "s" for region in saved):
                raise SnapshotError("the emulator shares writable memory")
            copy = _Copy(mark)
            with open(f"/proc/{pid}/mem", "rb") as memory:
                with open(folder / "memory", "wb") as out:
                    copy.run(memory.fileno(), out.fileno(), saved)
                gate = _syscall_instruction(memory.fileno(), found)
            mailbox = copy.by_index(pages)
            state = {
                "fixed": _fixed(found),
                "files": _open_files(pid),
                "saved": [(r.start, r.end, r.perms, r.name) for r in saved],
                "break": process.call(gate, _NR_BRK, 0),
                "registers": process.registers(),
                "extended": process.extended_state(),
                "mailbox": mailbox,
            }
        (folder / "state").write_bytes(marshal.dumps(state))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SnapshotError(str(e)) from e
    return mailbox


class _Copy:
    """Copies memory that is not zero; finds the guest's mailbox pages."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._mailbox: dict[int, int] = {}

    def by_index(self, pages: int) -> list[int]:
        """Addresses of the mailbox's pages. Raises SnapshotError unless all were found."""
        mailbox = [self._mailbox.get(i, 0) for i in range(pages)]
        if 0 in mailbox or len(self._mailbox) != pages:
            raise SnapshotError(f"{len(self._mailbox)} of {pages} mailbox pages found")
        return mailbox

    def run(self, memory: int, out: int, saved: list[Region]) -> None:
        """Copy all of ``saved``, one after the other, from ``memory`` to ``out`` (-1: nowhere)."""
        empty = bytes(_CHUNK)
        position = 0
        for region in saved:
            for start in range(region.start, region.end, _CHUNK):
                chunk = os.pread(memory, min(_CHUNK, region.end - start), start)
                if chunk != empty[: len(chunk)]:
                    self._find(chunk, start)
                    if out >= 0:
                        self._write(chunk, out, position + start - region.start)
            position += region.end - region.start
        if out >= 0:
            os.truncate(out, position)

    @staticmethod
    def _write(chunk: bytes, out: int, target: int) -> None:
        view, zero = memoryview(chunk), bytes(PAGE)
        used = [view[at : at + PAGE] != zero for at in range(0, len(chunk), PAGE)]
        first = 0
        while first < len(used):
            last = first
            while last < len(used) and used[last]:
                last += 1
            if last > first:
                os.pwrite(out, view[first * PAGE : last * PAGE], target + first * PAGE)
            first = last + 1

    def _find(self, chunk: bytes, start: int) -> None:
        at = chunk.find(self._mark)
        while at >= 0:
            if (start + at) % PAGE == 0:
                after = at + len(self._mark)
                self._mailbox[int.from_bytes(chunk[after : after + 4], "little")] = start + at
            at = chunk.find(self._mark, at + 1)


def fill_mailbox(pid: int, addresses: list[int], data: bytes) -> None:
    """Put ``data`` into the guest's mailbox: pages from 1 on, then length and flag in page 0.

    Raises SnapshotError if it does not fit.
    """
    if len(data) > capacity(len(addresses)):
        raise SnapshotError(f"{len(data)} bytes do not fit into the guest's mailbox")
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for number, at in enumerate(range(0, len(data), PAGE)):
            os.pwrite(memory.fileno(), data[at : at + PAGE], addresses[number + 1])
        os.pwrite(memory.fileno(), len(data).to_bytes(8, "little"), addresses[0] + 32)
        os.pwrite(memory.fileno(), b"\1", addresses[0] + 40)


def poke(pid: int, address: int, data: bytes) -> None:
    """Write into the memory of process ``pid``. Raises OSError."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), data, address)


def resume(pid: int, folder: Path, job: bytes) -> None:
    """Turn process ``pid``, a Bochs whose ROM waits, into the saved one.

    ``job`` is put into the guest's mailbox. Raises SnapshotError if the process does not match;
    it is unusable then.
    """
    try:
        state = marshal.loads((folder / "state").read_bytes())
        with Stopped(pid) as process:
            process.leave_system_call()
            found = regions(pid)
            if _fixed(found) != state["fixed"]:
                raise SnapshotError("the emulator lies at other addresses than when it was saved")
            later = set(state["files"]) - set(_open_files(pid))
            if set(_open_files(pid)) - set(state["files"]) or len(later) > 1:
                raise SnapshotError("the emulator has other files open than when it was saved")
            _replace(process, found, state, folder / "memory", list(later))
            process.set_extended_state(state["extended"])
            process.set_registers(state["registers"])
            fill_mailbox(pid, state["mailbox"], job)
    except (OSError, ValueError, KeyError) as e:
        raise SnapshotError(str(e)) from e


def _replace(
    process: Stopped,
    found: list[Region],
    state: dict[str, Any],
    source: Path,
    later: list[tuple[int, str]],
) -> None:
    """Map the saved memory over the process's own, each page loaded when it is first used.

    ``later`` are files (descriptor, name) that Bochs opens only when it needs them.
    """
    pid = process.pid
    stack = next(r for r in found if r.name == "[stack]")
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory, open(source, "rb") as content:
        gate = _syscall_instruction(memory.fileno(), found)
        scratch = stack.start  # far below what the stopped process uses
        for wanted, file in sorted(later):
            os.pwrite(memory.fileno(), os.fsencode(file) + b"\0", scratch)
            opened = process.call(gate, _NR_OPEN, scratch, os.O_RDWR | os.O_CREAT, 0o600)
            if opened != wanted:
                process.call(gate, _NR_DUP2, opened, wanted)
                process.call(gate, _NR_CLOSE, opened)
        os.pwrite(memory.fileno(), os.fsencode(source) + b"\0", scratch)
        fd = process.call(gate, _NR_OPEN, scratch, os.O_RDONLY)
        if process.call(gate, _NR_BRK, 0) < state["break"]:
            process.call(gate, _NR_BRK, state["break"])
        position = 0
        for start, end, perms, name in state["saved"]:
            size = end - start
            if name == "[stack]":
                if start < stack.start:
                    process.call(gate, _NR_MMAP, start, stack.start - start, _protection(perms),
                                 _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS, -1, 0)  # fmt: skip
                data = os.pread(content.fileno(), size, position)
                os.pwrite(memory.fileno(), data, start)
            else:
                process.call(gate, _NR_MMAP, start, size, _protection(perms),
                             _MAP_PRIVATE | _MAP_FIXED, fd, position)  # fmt: skip
            position += size
        process.call(gate, _NR_CLOSE, fd)


def _protection(perms: str) -> int:
    return (mmap.PROT_READ * (perms[0] == "r") | mmap.PROT_WRITE * (perms[1] == "w")
            | mmap.PROT_EXEC * (perms[2] == "x"))  # fmt: skip


def _syscall_instruction(memory: int, found: list[Region]) -> int:
    """Address of a SYSCALL instruction in the C library."""
    for region in found:
        if "x" in region.perms and "libc" in region.name:
            at = os.pread(memory, region.end - region.start, region.start).find(b"\x0f\x05")
            if at >= 0:
                return region.start + at
    raise SnapshotError("no system call instruction found in the emulator")
