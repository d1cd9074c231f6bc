"""The commands of ci/ as a user runs them: in a fresh clone, with a bare environment, twice."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASE = "test_vmresume_of_clear_vmcs"
STOPPED = 7  # exit code of the stand-in for shellcheck, ci/test's first command after set-up


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone of this tree would have, and nothing that was built from them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted, but not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``env -i`` with HOME and PATH; the checks of ci/test end at its first one."""
    programs = tmp_path_factory.mktemp("programs")
    shellcheck = programs / "shellcheck"
    shellcheck.write_text(f"#!/bin/sh\nexit {STOPPED}\n")
    shellcheck.chmod(0o755)
    return {"HOME": os.environ["HOME"], "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.parametrize("time", ["first", "second"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        pytest.param(["ci/conformance", "-k", CASE], 0, id="conformance"),
        pytest.param(["ci/job", "reports", "-k", CASE], 0, id="job"),
        pytest.param(["ci/test"], STOPPED, id="test"),
    ],
)
def test_command_in_a_clone(
    clone: Path, environment: dict[str, str], command: list[str], status: int, time: str
) -> None:
    done = run_in(clone, environment, command)
    assert done.returncode == status, done.stdout + done.stderr
    # A cold cache says what it prepares.
    assert all(line.startswith("kvmnest: ") for line in done.stderr.splitlines()), done.stderr
    if time == "second":
        assert done.stderr == ""
        assert "installing" not in done.stdout
    if status == 0:
        assert "1 passed" in done.stdout


def run_in(
    clone: Path, environment: dict[str, str], command: list[str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def no_compiler(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An empty cache, and a g++ that does not compile."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "g++").write_text("#!/bin/sh\nexit 1\n")
    (programs / "g++").chmod(0o755)
    path = f"{programs}:{environment['PATH']}"
    return {**environment, "PATH": path, "XDG_CACHE_HOME": str(tmp_path)}


def test_without_a_compiler_the_lab_uses_debians(clone: Path, no_compiler: dict[str, str]) -> None:
    """One clear line says what that leaves out, and the run is done."""
    done = run_in(clone, no_compiler, ["ci/conformance", "-k", CASE])
    assert done.returncode == 0, done.stdout + done.stderr
    # Nothing is cached, so what the lab tells of the archive is there too.
    assert "Bochs" not in done.stderr
    told = [line for line in done.stdout.splitlines() if "Debian's older Bochs" in line]
    assert len(told) == 1
    assert " of Bochs failed" in told[0]
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--bochs", "/bin/true"], ["--target", "kvm"], ["--boot", "nowhere"]]
)
def test_nothing_is_built_that_would_not_be_used(
    clone: Path, no_compiler: dict[str, str], arguments: list[str]
) -> None:
    done = run_in(clone, no_compiler, ["ci/conformance", "-k", CASE, *arguments])
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert "emulator" not in done.stdout
