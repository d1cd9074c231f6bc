"""A Bochs that emulates a CPU, memory and the ROM, driven by this process.

Guest memory is a file of this process's memory. Two pipes hand the CPU over, as KVM_RUN and its
return do. The other end of all this is in ``kvmnest/data/bochs-repairs.toml``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import subprocess
import time
from pathlib import Path

from kvmnest.errors import HarnessError
from kvmnest.kvm.memory import Memory
from kvmnest.lab import bochs, bochs_build, build, cache
from kvmnest.lab.bochs import Bochs, Emulator
from kvmnest.lab.errors import LabLost, LabSetupError
from kvmnest.reference import rom

#: Sizes of what follows guest memory in the file: the BIOS, expansion ROMs and a page for memory
#: that is not there; the ROM is the end of the BIOS. Then comes the page of registers.
_BIOS, _EXPANSION, _PAGE = 0x400000, 0x20000, 0x1000
_MIB = 1 << 20
_START_LIMIT = 30.0
_KICK_LIMIT = 5.0
_REGISTERS = struct.Struct("<25Q")

# IA32_DEBUGCTL, which Bochs does not have: 0, whatever is written.
_MSRS = "0x01d9 0 00000000 00000000 00000000 00000000 ffffffff ffffffff\n"

GO, RESET, KICK = b"G", b"R", b"K"
DONE, IO, MMIO, SHUTDOWN, KICKED = b"D", b"I", b"M", b"S", b"K"


def find(path: str | None = None, model: str | None = None) -> Emulator:
    """Find the Bochs that ``kvmnest lab build`` makes, or another one made so.

    Raises LabSetupError, with the remedy, if there is none; UsageError for a bad model.
    """
    program = path or (str(found) if (found := bochs_build.built()) else None)
    if program is None:
        raise LabSetupError("the reference target needs its own Bochs: kvmnest lab build")
    emulator = bochs.locate(program, model)
    if b"KVMNEST_CONTROL" not in Path(emulator.path).read_bytes():
        raise LabSetupError(
            f"{program} does not let other processes drive its CPU: kvmnest lab build makes one"
            " that does"
        )
    return emulator


class SharedMemory(Memory):
    """Guest memory of a bare CPU: ``Memory`` whose pages Bochs has mapped as well.

    Closing it gives the CPU back.
    """

    def __init__(self, cpu: BareCpu) -> None:
        self.cpu = cpu
        self.size = cpu.ram
        self._map = mmap.mmap(cpu.file, self.size)
        self.view = memoryview(self._map)

    def discard(self, offset: int) -> None:
        """Zero everything from ``offset`` (page-aligned) on by giving the pages back."""
        self._map.madvise(mmap.MADV_REMOVE, offset, self.size - offset)

    def close(self) -> None:
        """Give the CPU back."""
        super().close()
        self.cpu.used = False


class BareCpu(Bochs):
    """A CPU with ``ram`` bytes of memory. Starts when it is made; as a context manager it ends.

    Raises LabSetupError if it cannot be started.
    """

    def __init__(self, emulator: Emulator, ram: int) -> None:
        super().__init__(emulator)
        self.ram = ram
        #: Whether memory that is in use belongs to it.
        self.used = False
        #: Whether a new start is the only thing that helps.
        self.lost = False
        self._rom = ram + _BIOS - 0x10000
        self._registers = ram + _BIOS + _EXPANSION + _PAGE
        ends: list[int] = []
        self.file, self._to, self._from = -1, -1, -1
        try:
            self.file = os.memfd_create("kvmnest-reference", os.MFD_CLOEXEC)
            os.ftruncate(self.file, self._registers + _PAGE)
            self._map = mmap.mmap(self.file, self._registers + _PAGE)
            guest_from, self._to = os.pipe()
            self._from, guest_to = os.pipe()
            ends = [guest_from, guest_to]
            self._begin(guest_from, guest_to)
        except OSError as error:
            self.__exit__()
            raise LabSetupError(cache.describe(error, "starting the reference CPU")) from error
        except BaseException:
            self.__exit__()
            raise
        finally:
            for end in ends:
                os.close(end)

    def _begin(self, guest_from: int, guest_to: int) -> None:
        config = bochs.configuration(self.emulator, self.ram // _MIB, 1)
        # An MSR that Bochs does not know is not an MSR: the lab's kernels are shown zeroes.
        (self.folder / "bochsrc").write_text(config + "cpu: ignore_bad_msrs=0\n")
        (self.folder / "msrs.def").write_text(bochs.MSRS + _MSRS)
        (self.folder / "vga.rom").write_bytes(bochs.VGA_ROM)
        (self.folder / "boot.rom").write_bytes(build.build("reference_boot").read_bytes())
        environment = {
            "KVMNEST_MEMORY": str(self.file),
            "KVMNEST_CONTROL": f"{guest_from},{guest_to}",
        }
        with open(self.folder / "stdout.log", "wb") as output:
            self._launch(
                ["-q", "-f", "bochsrc"],
                subprocess.DEVNULL,
                output.fileno(),
                environment,
                files=(self.file, guest_from, guest_to),
            )
        if not select.select([self._from], [], [], _START_LIMIT)[0]:
            raise LabLost(f"{self.emulator.path} does not execute the reference target's ROM")
        self._said()

    def _said(self) -> bytes:
        said = os.read(self._from, 1)
        if not said:
            self.lost = True
            self.wait_end(1.0)
            raise HarnessError(f"the reference CPU ended: {self.verdict()}")
        return said

    def run(self, how: bytes) -> bytes:
        """Let it run, GO on or from a RESET; why it came back: DONE, IO, MMIO, SHUTDOWN, KICKED.

        Raises HarnessError if Bochs ended.
        """
        self._kicked = 0.0
        try:
            os.write(self._to, how)
        except OSError:
            return self._said()
        while not select.select([self._from], [], [], 0.5)[0]:
            if self._kicked and time.monotonic() - self._kicked > _KICK_LIMIT:
                self.lost = True
                return KICKED
        said = self._said()
        self.lost = said == KICKED
        return said

    def kick(self) -> None:
        """Make ``run`` come back; from a signal handler too."""
        if not self._kicked:
            self._kicked = time.monotonic()
            with contextlib.suppress(OSError):
                os.write(self._to, KICK)

    def tell(self, task: bytes) -> None:
        """Say what the ROM does after the next reset."""
        at = self._rom + rom.TASK - rom.ROM
        self._map[at : at + len(task)] = task

    def registers(self) -> tuple[int, ...]:
        """General registers by encoding, RIP, RFLAGS, CR0, CR2, CR3, CR4, EFER, CS, and one more.

        That is the address of MMIO, or of IO the port, with the size of the access in bits 23:16
        and bit 24 set for an OUT.
        """
        return _REGISTERS.unpack_from(self._map, self._registers)

    def __exit__(self, *_: object) -> None:
        """End it."""
        super().__exit__()
        for end in (self.file, self._to, self._from):
            if end >= 0:
                os.close(end)
        self.file = self._to = self._from = -1
