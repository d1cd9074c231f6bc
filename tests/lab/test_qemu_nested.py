"""QEMU with KVM and VMX, where none is at hand: inside the lab, whose Bochs has both.

Bochs boots a kernel, its KVM runs QEMU, which boots the same kernel with kvm_intel, which runs the
L1 payload and its L2: the suite's case is four levels deep.
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmnest.lab import qemu, rootfs
from kvmnest.lab.cpio import names
from kvmnest.lab.emulators import Picture
from kvmnest.lab.machine import Lab
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import outcome
from kvmnest.run.selection import Selection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed"),
    pytest.mark.skipif(shutil.which(qemu.PROGRAM) is None, reason="QEMU is not installed"),
]

CASE = "test_vmlaunch_vmresume.py::test_vmresume_of_clear_vmcs"
VAPIC = "/usr/share/qemu/kvmvapic.bin"  # what QEMU loads beside our ROM
MEMORY = 1408  # MiB for the guest that QEMU runs in

# What the host does with any emulator, done by the guest.
FOLLOW = """
import json, os, sys
from kvmnest.lab import qemu, session
session.BOOT_LIMIT = 6000
events, info = [], {}
with qemu.locate().process() as process:
    for name in ("memory.img", "boot.rom"):
        os.symlink("/picture/" + name, process.folder / name)
    process.start(int(sys.argv[1]), 1)
    followed = session.Session(
        session.Times(), events.append, sys.stderr.buffer.write, sys.stderr.buffer.write,
        lambda data: None, lambda data: None,
    )
    status = followed.follow(process, 1, 3000, None)
found = [json.loads(line) for line in events if line]
print(json.dumps({"status": status, "info": followed.info, "events": found}))
"""


class Written(Exception):
    """The picture of a guest with so many MiB is written."""


class Writing(qemu.Qemu):
    """Only writes what QEMU would boot, as files of another guest."""

    def __init__(self, emulator: qemu.Emulator, files: dict[str, bytes]) -> None:
        super().__init__(emulator)
        self._files = files

    def boot(self, memory: int, cpus: int, write: Picture) -> None:
        image = io.BytesIO()
        write(image)
        rom = (self.folder / "boot.rom").read_bytes()
        self._files.update({"/picture/memory.img": image.getvalue(), "/picture/boot.rom": rom})
        raise Written(memory)


@dataclass(frozen=True)
class Writer:
    """QEMU of which nothing runs."""

    qemu: qemu.Emulator
    files: dict[str, bytes]
    boot = "qemu"
    where = "nowhere"
    kernel_parameters = ""
    cpu_emulator = ""

    def process(self) -> Writing:
        return Writing(self.qemu, self.files)


def qemu_files() -> dict[str, bytes]:
    """QEMU and the libraries that the guest lacks."""
    program = Path(str(shutil.which(qemu.PROGRAM)))
    layers = (rootfs.python_layer(), rootfs.site_layer())
    present = {Path(name).name for layer in layers for name in names(layer.read())}
    missing = [path for path in rootfs.libraries_of(program) if path.name not in present]
    files = {f"/lib/{path.name}": rootfs.stripped(path.resolve()) for path in missing}
    files[f"/usr/bin/{qemu.PROGRAM}"] = rootfs.stripped(program)
    return files | {VAPIC: Path(VAPIC).read_bytes()}


def test_a_case_passes_in_qemu_with_kvm() -> None:
    files = qemu_files()
    inner = LabTarget(emulator=Writer(qemu.locate(accelerator="tcg"), files))
    with pytest.raises(Written) as written:
        outcome(inner, Selection([CASE], budget=60))
    out, err = [], []
    status = Lab(snapshots=False, memory=MEMORY).run(
        ["python3", "-c", FOLLOW, str(written.value)],
        on_output=out.append,
        on_error=err.append,
        idle_limit=900,
        files=files,
    )
    assert status == 0, b"".join(err).decode()
    found: dict[str, Any] = json.loads(b"".join(out))
    assert found["status"] == 0
    assert found["info"]["release"] == inner.release
    assert found["info"]["params"]["kvm_intel"]["nested"] == "Y"
    results = [event for event in found["events"] if event["e"] == "result"]
    assert [(case["id"], case["outcome"]) for case in results] == [(CASE, "passed")]
