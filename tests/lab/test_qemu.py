"""Real boots of Debian's kernel in QEMU, whose TCG needs no KVM (and has no VMX to test)."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab_processes import children_of, emulator_of, gone, watch

from kvmnest.cli.main import main
from kvmnest.host import why_not_kvm
from kvmnest.lab import qemu
from kvmnest.lab.emulators import Choice
from kvmnest.lab.errors import LabHang, LabLost, LabModuleError, LabPanic, LabSetupError
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.locate import locate
from kvmnest.lab.machine import Lab

pytestmark = pytest.mark.skipif(
    shutil.which(qemu.PROGRAM) is None, reason="qemu-system-x86_64 is not installed"
)

TCG = Choice("qemu", accelerator="tcg")
CASE = "test_vmlaunch_vmresume.py::test_vmresume_of_clear_vmcs"

COMMAND = f"""
import os, sys
with open("{EVENTS_PATH}", "w") as events:
    for i in range(3):
        print("event", i, file=events, flush=True)
sys.stdout.buffer.write(bytes(range(256)) * 300)
print("to stderr", os.cpu_count(), os.environ["EXTRA"], open("/root/extra").read(), file=sys.stderr)
import kvmnest.vmx, kvmnest.kvm, pytest, elftools
sys.exit(7)
"""


def without_kvm(cpus: int = 1) -> Lab:
    """A kernel that does not load KVM, which it could not here."""
    lab = Lab(cpus=cpus, emulator=TCG)
    lab._modules.clear()
    lab._kvm = lab._kvm_loading()
    return lab


def qemu_of(pid: int) -> int:
    return emulator_of(pid, "qemu-system-x86")


def test_a_command_in_the_guest_runs_and_all_its_streams_come_out() -> None:
    lab = without_kvm(cpus=2)
    seen = watch(lab, COMMAND, qemu_of)
    assert seen.code == 7
    assert seen.events == [b"event 0", b"event 1", b"event 2"]
    assert seen.out == bytes(range(256)) * 300
    assert seen.err == b"to stderr 2 from the host a file\n"
    assert seen.sockets == []
    assert lab.info["release"] == lab.kernel.release
    assert not children_of(os.getpid())


def test_a_cpu_without_vmx_is_named() -> None:
    with pytest.raises(LabModuleError, match=r"kvm_intel\.ko did not load") as caught:
        Lab(emulator=TCG).run(["true"])
    assert "no hardware support" in caught.value.console


def test_a_prompt_reaches_the_guest() -> None:
    code = f"""
import json
from kvmnest.lab.guest import Mailbox
mailbox = Mailbox(3, 0x3C)
events = open("{EVENTS_PATH}", "w")
for _ in range(2):
    mail = mailbox.wait(lambda mark: print(mark.hex(), file=events, flush=True))
    print(mail["text"], len(mail["more"]))
"""
    lab, out, number = without_kvm(), [], iter(range(2))

    def post(line: bytes) -> None:
        lab.post(bytes.fromhex(line.decode()), 3, {"text": next(number), "more": bytes(5000)})

    assert lab.run(["python3", "-c", code], on_event=post, on_output=out.append) == 0
    assert b"".join(out) == b"0 5000\n1 5000\n"


def test_a_guest_panic_is_named_with_its_first_lines() -> None:
    with pytest.raises(LabPanic, match="sysrq triggered crash") as caught:
        without_kvm().run(["python3", "-c", "open('/proc/sysrq-trigger', 'w').write('c')"])
    assert "Call Trace" in caught.value.console


def test_a_silent_guest_a_killed_qemu_and_a_reset_are_told_apart() -> None:
    lab = without_kvm()
    with pytest.raises(LabHang, match="nothing for 3 s"):
        lab.run(["python3", "-c", "while True: pass"], idle_limit=3)

    def kill(data: bytes) -> None:
        os.kill(qemu_of(os.getpid()), signal.SIGKILL)

    with pytest.raises(LabLost, match="SIGKILL"):
        lab.run(["python3", "-c", "print('up', flush=True)\nwhile True: pass"], on_output=kill)
    with pytest.raises(LabLost, match="the guest reset itself"):
        lab.run(["python3", "-c", "open('/proc/sysrq-trigger', 'w').write('b')"])


SCRIPT = f"""
import signal
from kvmnest.lab.emulators import Choice
from kvmnest.lab.machine import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)
lab = Lab(emulator={TCG!r})
lab._modules.clear()
lab._kvm = lab._kvm_loading()
lab.run(["python3", "-uc", "print('up')\\nwhile True: pass"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_no_qemu_outlives_its_run(number: signal.Signals, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            emulator = qemu_of(process.pid)
            process.send_signal(number)
            assert process.wait(10) != 0
        finally:
            process.kill()
    assert gone(emulator)
    if number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_a_qemu_that_does_not_start_is_named() -> None:
    with pytest.raises(LabLost, match=r"the emulator ended: .*invalid accelerator nonesuch$"):
        Lab(emulator=Choice("qemu", accelerator="nonesuch")).run(["true"])
    with pytest.raises(LabSetupError, match="/nonexistent/qemu not found: no such program"):
        locate(Choice("qemu", "/nonexistent/qemu", "tcg"))
    with pytest.raises(LabSetupError, match="is not QEMU"):
        locate(Choice("qemu", "/bin/true", "tcg"))


def test_a_missing_qemu_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LabSetupError, match=r"apt-get install qemu-system-x86$"):
        locate(TCG)


@pytest.mark.parametrize(
    "line", ["KVM: entry failed, hardware error 0x80000021", "KVM internal error. Suberror: 1"]
)
def test_a_guest_that_kvm_gives_up_is_not_waited_for(line: str, tmp_path: Path) -> None:
    """A program in QEMU's place: what it says is what QEMU says of a real one, and it goes on."""
    program = tmp_path / "qemu"
    program.write_text(
        "#!/bin/sh\ncase \"$*\" in *--version) echo 'QEMU emulator version 0'; exit;; esac\n"
        f"echo 'warning' >&2; echo '{line}' >&2; exec sleep 60\n"
    )
    program.chmod(0o755)
    lab = Lab(emulator=Choice("qemu", str(program), "tcg"))
    with pytest.raises(LabLost, match=f"the guest cannot go on: {line}"):
        lab.run(["true"], idle_limit=20)


VERBS = {
    "run": ["run", CASE],
    "repro": ["repro", "vmx-cpl"],
    "trace": ["trace", CASE],
    "shell": ["shell"],
    "caps": ["caps"],
    "caps diff": ["caps", "diff", "6.1", "6.1"],
    "fuzz": ["fuzz", "--cases", "1"],
    "bench": ["bench"],
    "lab run": ["lab", "run", "--boot", "qemu", "--qemu", "/nonexistent/qemu", "--", "true"],
    "matrix": ["matrix", "--kernels", "6.1"],
    "bisect": ["bisect", "--good", "6.1", "--bad", "6.12", "--case", CASE],
    "bisect step": ["bisect", "step", "--case", CASE],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_option(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is missing: first VMX, then the program."""
    words = list(VERBS[verb])
    if "--boot" not in words:
        words += ["--boot", "qemu", "--qemu", "/nonexistent/qemu"]
    if verb == "matrix":
        words += ["--state", str(tmp_path)]
    # A step without an answer ends `git bisect run`: 1 to 127 would be taken for one.
    assert main(words) == (129 if "step" in words else 3)
    said = capsys.readouterr()
    wanted = "not found" if not why_not_kvm() else "--boot qemu: KVM offers no VMX to guests here: "
    assert wanted in said.out + said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "--qemu", "/bin/true", CASE], "--qemu needs --boot qemu"),
        (["run", "--boot", "qemu", "--bochs", "/bin/true", CASE], "--bochs needs --boot lab"),
        (["run", "--boot", "qemu", "--target", "kvm", CASE], "--boot needs --target lab"),
        (["bench", "--qemu", "/bin/true"], "--qemu needs --target lab"),
        (["caps", "--target", "kvm", "--boot", "lab"], "--boot needs --target lab"),
    ],
)
def test_options_that_contradict(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(bool(why_not_kvm()), reason="needs a /dev/kvm that offers VMX to guests")
def test_a_case_passes_on_a_kernel_in_qemu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--boot", "qemu", CASE]) == 0
    assert "booting 6.1" in capsys.readouterr().out
