"""``kvmnest lab build``: Bochs' source from the archive, and what a build leaves behind.

The steps run for real (apt, tar, configure, make, the compilers). Where the source itself does not
matter it is a small one of ours, since Bochs takes minutes.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvmnest.lab import bochs, bochs_build, bochs_source, cache
from kvmnest.lab.errors import LabSetupError

MAIN = '#include <cstdio>\nint main() { puts("Bochs x86 Emulator 9.9"); }\n'
CONFIGURE = '#!/bin/sh\necho "$CXXFLAGS $*" > told\n'
# "slow" in the cache's parent makes the second file wait, so that a build can be interrupted.
MAKEFILE = """\
bochs: one.o two.o
\tg++ -o bochs one.o two.o
one.o: one.cc
\tg++ -c one.cc -o one.o
\techo one >> ../compiled
two.o: two.cc one.o
\tif [ -e {slow} ]; then sleep 60; fi
\tg++ -c two.cc -o two.o
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source in place of Bochs', and a cache of its own; the tarball."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tarball = tmp_path / "small.tar.xz"
    makefile = MAKEFILE.format(slow=tmp_path / "slow")
    pack(tarball, {"configure": CONFIGURE, "Makefile": makefile, "one.cc": MAIN, "two.cc": ""})
    monkeypatch.setattr(bochs_source, "source", small_source)
    monkeypatch.setattr(bochs_source, "fetch", lambda _, to: shutil.copy(tarball, to))
    return tarball


def small_source() -> bochs_source.Source:
    return bochs_source.Source("small", "9.9+x", "none", ())


def pack(tarball: Path, files: dict[str, str]) -> None:
    with tarfile.open(tarball, "w:xz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"small-9.9/{name}")
            member.size, member.mode = len(text), 0o755
            archive.addfile(member, io.BytesIO(text.encode()))


def test_the_archive_has_the_source_and_all_repairs_fit(tmp_path: Path) -> None:
    wanted = bochs_source.source()
    bochs_source.fetch(wanted, tmp_path / wanted.tarball)
    bochs_source.unpack(tmp_path / wanted.tarball, wanted, tmp_path / "tree")
    assert (tmp_path / "tree/configure").is_file()
    for repair in wanted.repairs:
        assert repair.new in (tmp_path / "tree" / repair.file).read_text(errors="replace")
        assert repair.reason
        assert repair.upstream


def test_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the archive is fetched, and is not what this index says."""
    record = bochs_source._record
    monkeypatch.setattr(
        bochs_source, "_record", lambda apt, wanted: (record(apt, wanted)[0], "0" * 64)
    )
    wanted = bochs_source.source()
    with pytest.raises(LabSetupError, match="Hash Sum mismatch"):
        bochs_source.fetch(wanted, tmp_path / wanted.tarball)
    assert not (tmp_path / wanted.tarball).exists()


def test_a_source_that_the_archive_has_not(tmp_path: Path) -> None:
    wanted = replace(bochs_source.source(), upstream="99.9+dfsg")
    with pytest.raises(LabSetupError, match=re.escape("trixie has no bochs_99.9+dfsg.orig")):
        bochs_source.fetch(wanted, tmp_path / wanted.tarball)


@pytest.mark.parametrize(("text", "times"), [("", 0), ("x y", 0), ("old old", 2)])
def test_a_repair_that_does_not_fit(tmp_path: Path, text: str, times: int) -> None:
    if text:
        (tmp_path / "f.cc").write_text(text)
    repair = bochs_source.Repair("f.cc", "old", "new", "reason", "upstream")
    with pytest.raises(LabSetupError, match=f"occurs {times} times in f.cc, not once"):
        repair.apply(tmp_path)


def test_a_build_is_made_once(small: Path) -> None:
    lines: list[str] = []
    seen: list[bochs_build.Progress] = []
    program = bochs_build.build(on_line=lines.append, on_progress=seen.append)
    assert b"Bochs" in subprocess.run([program], capture_output=True, check=True).stdout
    assert [(at.done, at.total) for at in seen if at.total] == [(0, 2), (1, 2), (2, 2)]
    assert bochs_build.built() == program
    assert bochs_build.notes(program)["version"] == "9.9"
    assert "one.cc" in (program.parent / "build.log").read_text()
    assert not bochs_build.log_file().exists()  # the tree is of no use any more
    small.unlink()
    assert bochs_build.build() == program
    assert bochs_build.built(smp=True) is None


def test_the_variant_for_several_cpus_is_another(small: Path) -> None:
    assert bochs_build.build(smp=True) != bochs_build.build()
    assert "--enable-smp" in bochs_build.notes(bochs_build.build(smp=True))["options"]


def test_another_cpu_needs_another_build(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bochs_build.build()
    monkeypatch.setattr(bochs_build, "_host_cpu", lambda: "model name: another\nflags: fpu\n")
    assert bochs_build.built() is None


def test_a_source_that_does_not_compile(small: Path, tmp_path: Path) -> None:
    makefile = MAKEFILE.format(slow="no")
    pack(small, {"configure": CONFIGURE, "Makefile": makefile, "one.cc": "int x", "two.cc": ""})
    with pytest.raises(bochs_build.BuildFailed, match=r"one\.cc.* error: .*\(log: .*build\.log\)"):
        bochs_build.build()
    assert "one.cc" in bochs_build.log_file().read_text()
    assert bochs_build.built() is None


def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    """It is called that, and what was done stays."""
    makefile = MAKEFILE.format(slow="no").replace("-o two.o", "-o /dev/full")
    pack(small, {"configure": CONFIGURE, "Makefile": makefile, "one.cc": MAIN, "two.cc": ""})
    with pytest.raises(bochs_build.BuildFailed, match=r"no space left on the disk \(log: "):
        bochs_build.build()
    assert (bochs_build.log_file().parent / "tree/one.o").is_file()
    assert bochs_build.built() is None


def test_too_little_room(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched."""
    usage = shutil._ntuple_diskusage(1 << 40, 0, 50 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    small.unlink()
    with pytest.raises(
        LabSetupError, match=r"has 50 MiB free, building Bochs needs 100 MiB \(XDG_CACHE_HOME"
    ):
        bochs_build.build()


def test_a_damaged_tarball_is_fetched_again(small: Path) -> None:
    whole = small.read_bytes()
    small.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabSetupError, match=r"unpacking small_9\.9\+x\.orig\.tar\.xz failed"):
        bochs_build.build()
    small.write_bytes(whole)
    assert bochs_build.build().is_file()


def test_what_is_built_is_no_bochs(small: Path) -> None:
    main = "int main() { return 0; }"
    makefile = MAKEFILE.format(slow="no")
    pack(small, {"configure": CONFIGURE, "Makefile": makefile, "one.cc": main, "two.cc": ""})
    with pytest.raises(bochs_build.BuildFailed, match="does not run"):
        bochs_build.build()
    assert bochs_build.built() is None


DRIVER = """
import shutil, sys
from kvmnest.cli.main import main
from kvmnest.lab import bochs_source
bochs_source.source = lambda: bochs_source.Source("small", "9.9+x", "none", ())
bochs_source.fetch = lambda _, to: shutil.copy(sys.argv[1], to)
sys.exit(main(["lab", "build"]))
"""


def start(small: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(small)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_no_compiler(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    process = start(small)
    output = process.communicate()[0]
    assert process.returncode == 3
    assert re.fullmatch(
        r"kvmnest: building Bochs needs more tools: apt-get install .*g\+\+.* make .*\n", output
    )


def wait_for(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def working_in(folder: Path) -> list[str]:
    """Processes whose working directory is below a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link).startswith(f"{folder}/"):
                found.append((link.parent / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_interrupted_goes_on(small: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "slow").touch()
    process = start(small)
    wait_for(lambda: any("sleep" in line for line in working_in(tmp_path)), "make at work")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == (130 if number == signal.SIGINT else -number), output
    wait_for(lambda: not working_in(tmp_path), f"left behind: {working_in(tmp_path)}")
    assert not list((cache.root() / "bochs").glob("*"))
    (tmp_path / "slow").unlink()
    process = start(small)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "going on with the build" in output
    program = Path(output.splitlines()[-1])
    # Not compiled again; SIGKILL may have lost the line of the first time.
    compiled = (program.parent / "build.log").read_text().count("echo one")
    assert compiled == 1 or (compiled == 0 and number == signal.SIGKILL)


def test_two_builders(small: Path, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    first = start(small)
    wait_for(lambda: any("sleep" in line for line in working_in(tmp_path)), "make at work")
    second = start(small)
    time.sleep(1)
    (tmp_path / "slow").unlink()
    first.send_signal(signal.SIGINT)  # the one that waits takes over what is there
    first.communicate()
    output = second.communicate(timeout=30)[0]
    assert second.returncode == 0, output
    assert "another process builds this Bochs" in output


def test_the_lab_takes_what_was_built(small: Path) -> None:
    """The user's own comes first, then the one built here, then the one in PATH."""
    assert bochs.built(1) is None
    several = str(bochs_build.build(smp=True))
    assert bochs.built(1) == bochs.built(2) == several
    one = str(bochs_build.build())
    assert (bochs.built(1), bochs.built(2)) == (one, several)
