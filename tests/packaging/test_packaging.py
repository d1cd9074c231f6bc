"""The sdist builds a wheel, and the wheel works from an empty directory."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import interpreters
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel made from it)."""
    out = tmp_path_factory.mktemp("dist")
    # Without --wheel or --sdist the wheel is built from the sdist.
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is in the wheel and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(folder)
    return folder


def test_contents(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    for wanted in ("py.typed", "data/l1.elf", "data/lab_boot.bin", "data/known.toml"):
        assert f"kvmnest/{wanted}" in names, wanted
    assert not [name for name in names if name.startswith(("tests/", "kvmnest/docs/"))]
    with tarfile.open(built[0]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"payloads/abi.inc", "payloads/build_backend.py", "pyproject.toml"} <= inside


def test_works_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    """Its own modules, payload and data; the dependencies are those of this environment."""
    paths = f"{installed}:{sysconfig.get_path('purelib')}"
    run_it = [sys.executable, "-P", "-S", "-m", "kvmnest"]
    code = "import kvmnest; print(kvmnest.__file__)"
    where = run(sys.executable, "-P", "-S", "-c", code, cwd=tmp_path, PYTHONPATH=paths)
    assert where.startswith(str(installed))
    assert "kvmnest" in run(*run_it, "--version", cwd=tmp_path, PYTHONPATH=paths)
    listed = run(*run_it, "list", "test_vmxon.py", cwd=tmp_path, PYTHONPATH=paths)
    assert "test_vmxon" in listed
    case = next(word for word in listed.split() if word.startswith("test_vmxon.py::"))
    done = run(*run_it, "run", "--target", "lab", "-j", "1", case, cwd=tmp_path, PYTHONPATH=paths)
    assert "1 passed" in done
    code = "from kvmnest.l1 import L1; from kvmnest.kvm import Kvm; print(L1(Kvm()).rdtsc())"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        said = run(sys.executable, "-P", "-S", "-c", code, cwd=tmp_path, PYTHONPATH=paths)
        assert "Succeed" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", interpreters.VERSIONS)
def test_wheel_in_a_fresh_environment(
    version: str, built: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each Python installs the wheel as users do, without a compiler, and L1 runs."""
    base = interpreters.find(version)
    if base is None:
        pytest.skip(f"no python{version} in PATH, KVMNEST_TEST_PYTHONS or pyenv's folder")
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    run(base, "-m", "venv", str(environment), cwd=empty)
    bin_folder = environment / "bin"
    python = str(bin_folder / "python")
    alone = {"PATH": str(bin_folder), "PYTHONPATH": "", "CC": "/nonexistent"}
    run(python, "-m", "pip", "install", "-q", str(built[1]), cwd=empty, **alone)
    kvmnest = str(bin_folder / "kvmnest")

    code = "import sys, kvmnest; print(sys.version_info[:2], kvmnest.__file__)"
    said = run(python, "-c", code, cwd=empty, **alone)
    assert said.startswith(str(tuple(map(int, version.split(".")))))
    assert str(environment) in said
    assert "test_vmxon.py::" in run(kvmnest, "list", "test_vmxon.py", cwd=empty, **alone)
    # Ready or not, by what this machine is; here the lab's tools are out of reach.
    doctor = subprocess.run(
        [kvmnest, "doctor", "--json"],
        cwd=empty, env={**os.environ, **alone}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert doctor.returncode in (0, 3), doctor.stderr
    checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
    assert checks["lab: bochs"]["state"] == "bad"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("the wheel is installed and lists its cases; no /dev/kvm to run L1 on")
    code = "from kvmnest.l1 import L1; from kvmnest.kvm import Kvm; print(L1(Kvm()).rdtsc())"
    assert run(python, "-c", code, cwd=empty, **alone).startswith("Succeed(value=0x")
    assert not list(empty.iterdir())
