"""Real boots of Debian's kernel in Bochs. Each takes some ten seconds, so each shows much."""

import marshal
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lab_processes import children_of, emulator_of, gone, watch

from kvmnest.errors import UsageError
from kvmnest.lab import bochs, cache, kernels, modules, session
from kvmnest.lab.emulators import Choice
from kvmnest.lab.errors import (
    KernelSpecError,
    LabHang,
    LabLost,
    LabModuleError,
    LabPanic,
    LabSetupError,
)
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.machine import Lab
from kvmnest.reports.model import Run
from kvmnest.run.judge import Judge
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.selection import Selection, pytest_arguments

pytestmark = pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed")

COMMAND = f"""
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
with open("{EVENTS_PATH}", "w") as events:
    for i in range(3):
        print("event", i, file=events, flush=True)
    print("x" * 70000, file=events, flush=True)
print("api", fcntl.ioctl(kvm, 0xAE00), os.environ["EXTRA"], open("/root/extra").read())
print("to stderr", file=sys.stderr)
import kvmnest.vmx, kvmnest.kvm, pytest, elftools
sys.exit(7)
"""


def bochs_of(pid: int) -> int:
    # Debian's bochs is a script that becomes bochs-bin.
    path = bochs.locate().path
    return emulator_of(pid, "bochs-bin" if path == shutil.which("bochs") else Path(path).name)


@pytest.mark.parametrize("snapshots", [False, True], ids=["cold", "snapshot"])
def test_a_command_in_the_guest_reaches_kvm_and_all_its_streams_come_out(snapshots):
    lab = Lab(kvm_params={"nested": "1", "enable_shadow_vmcs": "0"}, snapshots=snapshots)
    seen = watch(lab, COMMAND, bochs_of)
    assert seen.code == 7
    assert seen.events == [b"event 0", b"event 1", b"event 2", b"x" * 70000]
    assert seen.out == b"api 12 from the host a file\n"
    assert seen.err == b"to stderr\n"
    assert seen.sockets == []
    params = lab.info["params"]
    assert isinstance(params, dict)
    assert (params["kvm_intel"]["nested"], params["kvm_intel"]["enable_shadow_vmcs"]) == ("Y", "N")
    assert lab.info["release"] == lab.kernel.release
    assert not children_of(os.getpid())


def test_a_run_continues_from_the_snapshot_and_a_bad_one_is_replaced():
    command = ["python3", "-c", "import sys; print(len(sys.argv), 'pytest' in sys.modules)", "a"]
    outputs: list[bytes] = []
    lab = Lab()
    assert lab.run(command, on_output=outputs.append) == 0
    assert lab.run(command, on_output=outputs.append) == 0
    assert lab.times.resumed
    assert lab.times.boot < 20
    # Bytes of another process: the check of addresses must notice, and the run must go on.
    assert lab._saved is not None
    last = lab._saved._steps(lab._kvm, {})[-1]
    saved = cache.root() / last.kind / last.key
    assert last.kind == "with-kvm"
    state = marshal.loads((saved / "state").read_bytes())
    state["fixed"] = [(start, *rest[:-1], "other") for start, *rest in state["fixed"]]
    (saved / "state").write_bytes(marshal.dumps(state))
    assert lab.run(command, on_output=outputs.append) == 0
    assert not saved.exists() or (saved / "state").read_bytes() != marshal.dumps(state)
    assert outputs == [b"2 True\n"] * 3


def test_a_guest_panic_is_named_with_its_first_lines():
    started = time.monotonic()
    with pytest.raises(LabPanic, match="sysrq triggered crash") as caught:
        Lab().run(["python3", "-c", "open('/proc/sysrq-trigger', 'w').write('c')"])
    assert "Call Trace" in caught.value.console
    assert time.monotonic() - started < 60


def test_a_silent_guest_is_a_hang_and_a_killed_emulator_is_lost():
    lab = Lab()
    with pytest.raises(LabHang, match="nothing for 2 s"):
        lab.run(["python3", "-c", "while True: pass"], idle_limit=2)

    def kill(data: bytes) -> None:
        if data.startswith(b"up"):
            os.kill(bochs_of(os.getpid()), signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(LabLost, match="SIGKILL"):
        lab.run(["python3", "-c", "print('up', flush=True)\nwhile True: pass"], on_output=kill)
    assert time.monotonic() - started < 60


def test_interrupt_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "kvmnest", "lab", "run", "--", "python3", "-uc",
               "print('up')\nwhile True: pass"]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    timer = threading.Timer(90, process.kill)
    timer.start()
    assert process.stdout.readline() == b"up\n"
    emulator = bochs_of(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    timer.cancel()
    assert not Path(f"/proc/{emulator}").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_emulator(tmp_path):
    command = [sys.executable, "-m", "kvmnest", "lab", "run", "--", "python3", "-c", "1"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment)
    emulator = bochs_of(process.pid)
    process.kill()
    process.wait()
    assert gone(emulator)
    # The next run removes what the killed one left.
    assert [p.name[:12] for p in tmp_path.iterdir()] == ["kvmnest-lab-"]
    code = "from kvmnest.lab import bochs\nwith bochs.Bochs(bochs.locate()): pass"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_module_for_another_kernel_is_refused_before_the_boot(tmp_path):
    kernel = kernels.resolve()
    for name in ("kvm", "kvm_intel"):
        content = kernel.modules[name].read_bytes()
        vermagic = b"vermagic=" + kernel.release.encode()
        assert vermagic in content
        wrong = vermagic.replace(b"6.1.0", b"6.0.0")
        (tmp_path / f"{name}.ko").write_bytes(content.replace(vermagic, wrong))
    with pytest.raises(KernelSpecError, match=r"was built for 6\.0\.0-"):
        Lab(kvm_modules=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KernelSpecError, match="has no kvm"):
        Lab(kvm_modules=tmp_path / "empty")


def test_a_module_that_does_not_load_is_named(tmp_path):
    kernel = kernels.resolve()
    for name in ("kvm", "kvm_intel"):
        shutil.copy(kernel.modules[name], tmp_path / kernel.modules[name].name)
    # A symbol that no kernel has, of the same length: the module asks for it in vain.
    path = tmp_path / kernel.modules["kvm_intel"].name
    path.write_bytes(path.read_bytes().replace(b"\0kvm_init\0", b"\0kvm_1n1t\0"))
    with pytest.raises(LabModuleError, match=r"kvm_intel\.ko did not load") as caught:
        Lab(kvm_modules=tmp_path).run(["true"])
    assert "kvm_1n1t" in caught.value.console


def test_a_directory_is_a_kernel_too(tmp_path):
    kernel = kernels.resolve()
    folder = tmp_path / "kernel"
    (folder / "modules").mkdir(parents=True)
    # an unpacked package is what the cache was made from; a bare folder must do as well
    for path in kernel.modules.values():
        shutil.copy(path, folder / "modules")
    with pytest.raises(KernelSpecError, match="holds no bzImage"):
        kernels.resolve(str(folder))
    assert [m.name for m in modules.load_order(
        kernels.MODULES, modules.find(folder), frozenset(), "x")][-1] == "kvm_intel"  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("missing.deb", "no such file"),
        ("/nonexistent/dir", "no such directory"),
        ("latest", "no Debian kernel version"),
    ],
)
def test_wrong_kernel_specs(spec, text):
    with pytest.raises(KernelSpecError, match=text):
        kernels.resolve(spec)


def test_a_corrupt_package_is_named(tmp_path):
    package = tmp_path / "linux-image.deb"
    package.write_bytes(b"!<arch>\ndebian-binary   garbage")
    with pytest.raises(KernelSpecError, match="not a usable Debian package"):
        kernels.resolve(str(package))


# What the lab asks a Bochs before it starts it.
HELP = """[ "$2" = cpu ] && { echo Supported CPU models:; echo; echo corei7_skylake_x; exit; }
[ "$1" = --help ] && { echo Bochs x86 Emulator 3.0; exit; }"""


def test_a_folder_that_lost_its_lock_is_swept(tmp_path, monkeypatch):
    """As two Ctrl-C leave it, the second of which ends the removal."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "kvmnest-lab-left"
    (left / "sub").mkdir(parents=True)
    (left / "memory.img").write_bytes(b"x")
    with bochs.Bochs(bochs.locate()) as running:
        assert sorted(tmp_path.iterdir()) == [running.folder]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("does", "text"),
    [
        ("echo '[ ] exiting with the following message:' >&2; echo 'no CPU' >&2; exit 1", "no CPU"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("exit 0", "exit status 0"),
        ("exec sleep 600", "does not execute the lab's ROM"),
    ],
    ids=["says why", "crashes", "ends", "sleeps"],
)
def test_a_bochs_that_does_not_come_to_the_rom(tmp_path, monkeypatch, does, text):
    monkeypatch.setattr(bochs, "_ASLEEP_LIMIT", 1.0)
    program = tmp_path / "bochs"
    program.write_text(f"#!/bin/sh\n{HELP}\n{does}\n")
    program.chmod(0o755)
    with pytest.raises(LabLost, match=text):
        Lab(emulator=Choice(program=str(program))).run(["true"])
    assert not children_of(os.getpid())


def test_wrong_settings_are_refused():
    with pytest.raises(KernelSpecError, match="has no parameter nestedd"):
        Lab(kvm_params={"nestedd": "1"})
    with pytest.raises(UsageError, match="1 to 8 CPUs"):
        Lab(cpus=0)
    with pytest.raises(LabSetupError, match="no such program"):
        bochs.locate("/nonexistent/bochs")
    with pytest.raises(LabSetupError, match="is not Bochs"):
        bochs.locate("/bin/true")


def test_an_emulator_that_is_stopped_is_told(monkeypatch):
    """It uses no CPU time, by which the silence of a guest is measured."""
    monkeypatch.setattr(session, "STOPPED_LIMIT", 10)

    def stop(data: bytes) -> None:
        if data.startswith(b"up"):
            os.kill(bochs_of(os.getpid()), signal.SIGSTOP)

    started = time.monotonic()
    with pytest.raises(LabHang, match="the emulator does not run"):
        Lab().run(["python3", "-c", "print('up', flush=True)\nwhile True: pass"], on_output=stop)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("when", ["result", "end"])
def test_an_emulator_that_is_killed_at_the_end(when):
    """The results are there, and nobody waits for the rest."""
    judge = Judge(Run("lab"))
    target = LabTarget(patience=300)
    killed = []

    def take(event):
        judge.event(event)
        if event["e"] == when:
            killed.append(time.monotonic())
            os.kill(bochs_of(os.getpid()), signal.SIGKILL)

    case = "kvmnest.suite.test_vmxon::test_vmxon_enters_vmx_operation"
    ended = target.run(pytest_arguments(Selection(), "lab", [case], []), take)
    assert time.monotonic() - killed[0] < 10
    assert ended.status in (0, None)  # it may have said all before it was gone
    assert len(judge.run.cases) == 1
    assert judge.run.complete
