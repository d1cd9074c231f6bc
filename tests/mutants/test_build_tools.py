"""The programs that build a module: which are missing, and tools of a newer suite made to run."""

import os
import subprocess
from pathlib import Path

import pytest

from kvmnest.kernel import build_tools
from kvmnest.lab.errors import LabSetupError

TOOLS = ("scripts/basic/fixdep", "scripts/mod/modpost", "tools/objtool/objtool")
NEWER = 'echo "$0: libc.so.6: version \\`GLIBC_9.9\' not found (required by $0)" >&2; exit 1'


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def kbuild(folder: Path, text: str) -> Path:
    tools = folder / "usr/lib/linux-kbuild-7.3"
    for name in TOOLS:
        script(tools / name, text)
    headers = folder / "usr/src/linux-headers-7.3"
    headers.mkdir(parents=True)
    for name in ("scripts", "tools"):
        (headers / name).symlink_to(f"../../lib/linux-kbuild-7.3/{name}")
    return headers


def test_tools_that_run_are_left_alone(tmp_path: Path) -> None:
    headers = kbuild(tmp_path, "echo usage >&2; exit 1")
    before = {name: (headers / name).read_text() for name in TOOLS}
    build_tools.make_runnable(tmp_path, lambda name, to: pytest.fail(f"{name} is not needed"))
    assert {name: (headers / name).read_text() for name in TOOLS} == before
    build_tools.require(headers, "7.3")


def test_tools_of_a_newer_suite_run_through_its_loader(tmp_path: Path) -> None:
    """Through a link, and by a relative path, as make calls them."""
    headers = kbuild(tmp_path, NEWER)
    # One is but a launcher, which would look for the program beside the loader.
    script(headers / "tools/objtool/objtool.real-x86", NEWER)
    asked = []

    def unpack(name: str, to: Path) -> None:
        asked.append(name)
        text = 'echo "$3" "$(basename "$3")" "$4"; test -d "$2" && test "$1" = --library-path'
        script(to / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", text)

    with pytest.raises(LabSetupError, match=r"build tools of 7\.3 do not run here: .*GLIBC_9\.9"):
        build_tools.require(headers, "7.3")
    build_tools.make_runnable(tmp_path, unpack)
    assert "libc6" in asked
    for name in TOOLS:
        for program in (headers / name, Path(os.path.relpath(headers / name, tmp_path))):
            done = subprocess.run(
                [program, "an argument"], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            path, _, rest = done.stdout.partition(" ")
            assert (tmp_path / path).is_file()
            wanted = (
                "objtool.real-x86" if name.endswith("objtool") else f"{Path(name).name}.program"
            )
            assert rest == f"{wanted} an argument\n"
    build_tools.require(headers, "7.3")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ((), "needs gcc, make, ld, objcopy, bc, xz: apt-get install bc binutils gcc make xz-utils"),
        (("make", "ld", "objcopy", "bc", "xz"), "needs gcc: apt-get install gcc"),
        (("gcc", "make", "ld", "objcopy", "xz"), "needs bc: apt-get install bc"),
    ],
)
def test_programs_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], message: str
) -> None:
    for name in there:
        script(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabSetupError) as caught:
        build_tools.require_programs("7.3.4-amd64")
    assert str(caught.value) == f"building KVM for 7.3.4-amd64 {message}"


def test_the_compiler_is_the_kernels_or_gcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "CCACHE = ccache\nCC = $(CROSS_COMPILE)gcc-14\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_tools.compiler(settings) == "gcc"
    script(tmp_path / "gcc-14", "")
    assert build_tools.compiler(settings) == "gcc-14"
