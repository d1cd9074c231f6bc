"""QEMU with KVM and VMX, where none is at hand: inside the lab, whose Bochs has both.

Bochs boots a kernel, its KVM runs QEMU, which boots the same kernel with kvm_intel, which runs the
L1 payload and its L2: the suite's case is four levels deep.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvmnest.lab import build, qemu, rootfs, session
from kvmnest.lab.cpio import Cpio, names
from kvmnest.lab.emulators import Choice, Picture
from kvmnest.lab.machine import Lab
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.selection import Selection, pytest_arguments, split_selection
from kvmnest.run.targets import Ended

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed"),
    pytest.mark.skipif(shutil.which(qemu.PROGRAM) is None, reason="QEMU is not installed"),
]

CASE = "test_vmlaunch_vmresume.py::test_vmresume_of_clear_vmcs"
VAPIC = "usr/share/qemu/kvmvapic.bin"  # what QEMU loads beside our ROM
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


class Prepared(LabTarget):
    """Keeps what would be run."""

    def _boot(self, argv: list[str], files: dict[str, bytes], on_event: object) -> Ended:
        self.command = argv, files
        return Ended(0)


def picture(folder: Path) -> Lab:
    """Write the picture of memory for QEMU, as ``Lab.run`` does, and the ROM."""
    target = Prepared(emulator=Choice("qemu", accelerator="tcg"))
    arguments = pytest_arguments(Selection(budget=60), target.name, split_selection([CASE])[0], [])
    target.run(arguments, lambda event: None)
    argv, files = target.command
    lab = target._lab

    class Here:
        def __init__(self) -> None:
            self.folder = folder

        def boot(self, memory: int, cpus: int, write: Picture) -> None:
            """Write the picture; the guest starts QEMU."""
            with open(self.folder / "memory.img", "wb") as image:
                write(image)

    lab._start(Here(), lab._job(argv, {}, files))  # type: ignore[arg-type]
    shutil.copy(build.build(), folder / "boot.rom")
    return lab


def layer(folder: Path, present: set[str]) -> rootfs.Layer:
    """QEMU, the libraries that the guest lacks, and what it is to boot."""
    archive = Cpio()
    program = Path(str(shutil.which(qemu.PROGRAM)))
    archive.file(f"usr/bin/{qemu.PROGRAM}", rootfs._stripped(program), 0o755)
    _, loader = rootfs._interpreter_and_loader()
    for library in rootfs._libraries(loader, program):
        if library.name not in present:
            archive.file(f"lib/{library.name}", rootfs._stripped(library.resolve()), 0o755)
    archive.file(VAPIC, Path("/", VAPIC).read_bytes())
    for name in ("memory.img", "boot.rom"):
        archive.file(f"picture/{name}", (folder / name).read_bytes())
    path = folder / "layer.cpio"
    path.write_bytes(archive.finish())
    return rootfs.Layer("", path)


def test_a_case_passes_in_qemu_with_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "BOOT_LIMIT", 600.0)  # its initramfs is six times the usual one
    inner = picture(tmp_path)
    outer = Lab(snapshots=False)
    present = {Path(name).name for one in outer._layers for name in names(one.read())}
    outer._layers.append(layer(tmp_path, present))
    outer._memory = MEMORY
    out, err = [], []
    status = outer.run(
        ["python3", "-c", FOLLOW, str(inner._memory)],
        on_output=out.append,
        on_error=err.append,
        idle_limit=900,
    )
    assert status == 0, b"".join(err).decode()
    found: dict[str, Any] = json.loads(b"".join(out))
    assert found["status"] == 0
    assert found["info"]["release"] == inner.kernel.release
    assert found["info"]["params"]["kvm_intel"]["nested"] == "Y"
    results = [event for event in found["events"] if event["e"] == "result"]
    assert [(case["id"], case["outcome"]) for case in results] == [(CASE, "passed")]
