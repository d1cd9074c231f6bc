"""Assemble Bochs' ROMs (``payloads/*_boot.s``) into the package's data.

Runs when the package is built, or on demand in a source checkout; needs binutils only.
"""

import subprocess
from pathlib import Path

from kvmnest import files, scratch
from kvmnest.lab import tools
from kvmnest.lab.errors import LabSetupError

DATA = Path(__file__).parent.parent / "data"
SOURCES = Path(__file__).parent.parent.parent / "payloads"
#: The lab's, and the reference target's.
ROMS = ("lab_boot", "reference_boot")
ROM_SIZE = 0x10000


def build(name: str = "lab_boot") -> Path:
    """Build a ROM if it is missing or older than its sources; returns its path.

    Raises LabSetupError without binutils, without the source, or if the result is not a 64 KiB ROM.
    """
    target, source = DATA / f"{name}.bin", SOURCES / f"{name}.s"
    if not source.is_file():
        if target.is_file():
            return target
        raise LabSetupError(f"{target} is missing from this installation of kvmnest")
    newest = max(file.stat().st_mtime_ns for file in (source, SOURCES / "abi.inc"))
    if target.is_file() and target.stat().st_mtime_ns >= newest:
        return target
    with scratch.folder() as folder:
        obj, elf, rom = (str(Path(folder) / name) for name in ("rom.o", "rom.elf", "rom.bin"))
        for argv in (
            ["as", "--64", "-I", str(SOURCES), "-o", obj, str(source)],
            ["ld", "-m", "elf_x86_64", "-Ttext", "0", "-o", elf, obj],
            ["objcopy", "-O", "binary", "-j", ".text", elf, rom],
        ):
            done = subprocess.run(
                [tools.find(argv[0]), *argv[1:]], capture_output=True, check=False
            )
            if done.returncode:
                raise LabSetupError(f"building {source.name}: {done.stderr.decode().strip()}")
        data = Path(rom).read_bytes()
    if len(data) != ROM_SIZE:
        raise LabSetupError(f"building {source.name}: {len(data)} bytes instead of {ROM_SIZE}")
    DATA.mkdir(exist_ok=True)
    files.replace(target, data)
    return target


if __name__ == "__main__":
    for each in ROMS:
        build(each)
