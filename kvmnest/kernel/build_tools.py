"""The programs that build a kernel's modules: the host's compiler, and the kernel's own tools.

The tools of a package linux-kbuild want the C library of the suite that they come from. Where the
host's is older, each is started through the loader of that suite, unpacked beside it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from kvmnest.lab import tools
from kvmnest.lab.errors import LabSetupError

#: Those that building a module runs, each with the program proper where the name is but a
#: launcher that looks for it beside itself.
_TOOLS = {
    "scripts/basic/fixdep": "",
    "scripts/mod/modpost": "scripts/mod/modpost.real-lsb-64",
    "tools/objtool/objtool": "tools/objtool/objtool.real-x86",
}
_LIBRARIES = ("libc6", "libelf1t64", "zlib1g", "libzstd1")
_LIBRARY_FOLDER = "usr/lib/x86_64-linux-gnu"


def require_programs(release: str) -> None:
    """Raise LabSetupError naming the packages of the host's programs that are missing."""
    missing = [name for name in ("make", "ld", "objcopy", "bc", "xz") if not shutil.which(name)]
    if not shutil.which("gcc"):
        missing.insert(0, "gcc")
    if missing:
        packages = sorted({tools.package(name) for name in missing})
        raise LabSetupError(
            f"building KVM for {release} needs {', '.join(missing)}:"
            f" apt-get install {' '.join(packages)}"
        )


def compiler(settings: str) -> str:
    """The compiler to use: the one that the headers' settings name if it is there, else gcc."""
    found = re.search(r"\bgcc-\d+\b", settings)
    return found[0] if found and shutil.which(found[0]) else "gcc"


def require(headers: Path, release: str) -> None:
    """Raise LabSetupError if one of the kernel's tools does not start on this machine."""
    for why in filter(None, map(_why_not, _programs(headers))):
        raise LabSetupError(f"the build tools of {release} do not run here: {why}")


def make_runnable(folder: Path, unpack: Callable[[str, Path], None]) -> None:
    """Let the tools below an unpacked linux-kbuild package in ``folder`` run on this machine.

    ``unpack`` puts the content of a package into a folder.
    """
    (kbuild,) = (folder / "usr/lib").glob("linux-kbuild-*")
    if not any(map(_why_not, _programs(kbuild))):
        return
    libraries = folder / "libraries"
    for package in _LIBRARIES:
        unpack(package, libraries)
    for name, proper in _TOOLS.items():
        path = kbuild / name
        program = kbuild / proper
        if not proper or not program.is_file():
            program = path.with_name(f"{path.name}.program")
            path.rename(program)
        up = "../" * len(path.relative_to(folder).parent.parts)
        path.unlink(missing_ok=True)
        # The headers reach this folder through a link, so the way is from the script's own place.
        path.write_text(
            "#!/bin/sh\nhere=${0%/*}\n"
            f'libraries="$here/{up}libraries/{_LIBRARY_FOLDER}"\n'
            'exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries"'
            f' "$here/{program.name}" "$@"\n'
        )
        path.chmod(0o755)


def _programs(folder: Path) -> list[Path]:
    """What to start to see whether the tools do: scripts of ours, else the programs proper."""
    found = []
    for name, proper in _TOOLS.items():
        path = folder / name
        ours = path.read_bytes().startswith(b"#!")
        found.append(path if ours or not (folder / proper).is_file() else folder / proper)
    return found


def _why_not(program: Path) -> str:
    """Why a program does not start, "" if it does; what it says of its arguments is no matter."""
    try:
        done = subprocess.run(
            [program], capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=30
        )
    except OSError as error:
        return f"{program.name}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return ""
    for line in done.stderr.decode(errors="replace").splitlines():
        if "error while loading shared libraries" in line or "not found (required by" in line:
            return line
    return ""
