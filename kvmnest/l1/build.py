"""Build the payload with GNU as and ld: ``python -m kvmnest.l1.build``."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kvmnest.errors import PayloadError

PACKAGE = Path(__file__).resolve().parent.parent
#: The sources, present in a checkout and in an sdist but not in an installed wheel.
SOURCES = PACKAGE.parent / "payloads"
ELF = PACKAGE / "data" / "l1.elf"


def source_hash(sources: Path = SOURCES) -> str | None:
    """SHA-256 over the payload's sources, hexadecimal; None where there are no sources."""
    main = sources / "l1.s"
    try:
        names = re.findall(r'^\s*\.include\s+"([^"]+)"', main.read_text(), re.MULTILINE)
        contents = [(name, (sources / name).read_bytes()) for name in ("l1.s", "link.ld", *names)]
    except OSError:
        return None
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise PayloadError(
            f"cannot build the payload: '{name}' is not installed "
            "(apt-get install binutils, or use a kvmnest wheel, which carries the payload)"
        )
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise PayloadError(f"cannot build the payload: {Path(command[0]).name}: {lines[0]}")


def build(elf: Path = ELF, sources: Path = SOURCES) -> Path:
    """Assemble and link the payload into ``elf`` (atomically) and return its path.

    The hash of the sources becomes the ELF's build ID, by which a stale payload is recognised.

    Raises:
        PayloadError: no sources, no assembler or linker, or an error in the sources.
    """
    from kvmnest import scratch  # not in the lab's guest, which loads a payload that was built

    digest = source_hash(sources)
    if digest is None:
        raise PayloadError(f"cannot build the payload: no sources in {sources}")
    assembler, linker = _tool("as"), _tool("ld")
    elf.parent.mkdir(parents=True, exist_ok=True)
    with scratch.folder() as folder:
        obj, out = os.path.join(folder, "l1.o"), os.path.join(folder, "l1.elf")
        main = str(sources / "l1.s")
        _run([assembler, "--64", "--fatal-warnings", "-I", str(sources), "-o", obj, main])
        script = str(sources / "link.ld")
        options = ["-static", "-nostdlib", "--no-warn-rwx-segments", "-z", "max-page-size=4096"]
        options += ["-z", "noseparate-code", f"--build-id=0x{digest}", "-T", script]
        _run([linker, *options, "-o", out, obj])
        temporary = elf.with_suffix(f".{os.getpid()}")
        shutil.copyfile(out, temporary)
        os.replace(temporary, elf)
    return elf


def build_if_stale() -> None:
    """In a checkout, build the payload unless it is that of the sources; raises as ``build``."""
    digest = source_hash()
    if digest is None:
        return
    try:
        if bytes.fromhex(digest) in ELF.read_bytes():
            return
    except OSError:
        pass
    build()


if __name__ == "__main__":
    try:
        print(build())
    except PayloadError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
