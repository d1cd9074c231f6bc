"""Assemble the lab's ROM (``payloads/lab_boot.s``) into the package's data.

Runs when the package is built, or on demand in a source checkout; needs binutils only.
"""

import subprocess
from pathlib import Path

from kvmnest import scratch
from kvmnest.lab import tools
from kvmnest.lab.errors import LabSetupError

TARGET = Path(__file__).parent.parent / "data" / "lab_boot.bin"
SOURCE = Path(__file__).parent.parent.parent / "payloads" / "lab_boot.s"
ROM_SIZE = 0x10000


def build() -> Path:
    """Build the ROM if it is missing or older than its source; returns its path.

    Raises LabSetupError without binutils, without the source, or if the result is no 64 KiB ROM.
    """
    if not SOURCE.is_file():
        if TARGET.is_file():
            return TARGET
        raise LabSetupError(f"{TARGET} is missing from this installation of kvmnest")
    if TARGET.is_file() and TARGET.stat().st_mtime_ns >= SOURCE.stat().st_mtime_ns:
        return TARGET
    with scratch.folder() as folder:
        obj, elf, rom = (str(Path(folder) / name) for name in ("rom.o", "rom.elf", "rom.bin"))
        for argv in (
            ["as", "--64", "-o", obj, str(SOURCE)],
            ["ld", "-m", "elf_x86_64", "-Ttext", "0", "-o", elf, obj],
            ["objcopy", "-O", "binary", "-j", ".text", elf, rom],
        ):
            done = subprocess.run(
                [tools.find(argv[0]), *argv[1:]], capture_output=True, check=False
            )
            if done.returncode:
                raise LabSetupError(f"building {SOURCE.name}: {done.stderr.decode().strip()}")
        data = Path(rom).read_bytes()
    if len(data) != ROM_SIZE:
        raise LabSetupError(f"building {SOURCE.name}: {len(data)} bytes instead of {ROM_SIZE}")
    TARGET.parent.mkdir(exist_ok=True)
    temporary = TARGET.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(TARGET)
    return TARGET


if __name__ == "__main__":
    build()
