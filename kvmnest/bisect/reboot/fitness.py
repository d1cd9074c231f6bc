"""Why a machine cannot be bisected by restarts: each problem in one line that says what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvmnest.bisect.reboot import grub
from kvmnest.bisect.reboot.commands import first_line
from kvmnest.errors import HarnessError

_TOOLS = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    "update-grub": "grub2-common",
    "grub-reboot": "grub2-common",
    "grub-editenv": "grub-common",
    "grub-probe": "grub-common",
    "systemctl": "systemd",
    "modprobe": "kmod",
}
NO_ROOT = "root is needed: kernels are installed and the machine is restarted"
_SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def require_root() -> None:
    """Raise HarnessError for anyone else."""
    if os.geteuid() != 0:
        raise HarnessError(NO_ROOT)


def problems(root: Path, *, own_kernels: bool) -> Iterator[str]:
    """What is in the way on the system whose files are at ``root``, the most telling first."""
    if os.geteuid() != 0:
        yield NO_ROOT
    if not (root / "run/systemd/system").is_dir():
        yield "systemd is not what runs this system, so nothing would go on after a restart"
    elif (root / "run/systemd/container").exists():
        kind = _text(root / "run/systemd/container")
        yield f"this is a container ({kind}): it has no kernel of its own to restart"
    if "vmx" not in _text(root / "proc/cpuinfo").split():
        yield "this CPU has no VMX (no vmx flag in /proc/cpuinfo): --boot lab needs none"
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            yield f"{tool} not found: apt-get install {package}"
    if not (root / "boot/grub/grub.cfg").is_file():
        yield f"{root / 'boot/grub/grub.cfg'} does not exist: GRUB is not what boots this system"
    else:
        yield from _environment_block(root / "boot/grub")
    users = _text(root / "sys/module/kvm_intel/refcnt")
    if users not in ("", "0"):
        yield f"kvm_intel is in use ({users}): stop the VMs first, the machine will be restarted"
    if own_kernels and _efi_variable(root, _SECURE_BOOT) == b"\x01":
        yield "Secure Boot is on: it boots no kernel that you built; turn it off in the firmware"


def _environment_block(folder: Path) -> Iterator[str]:
    """GRUB must clear next_entry, or it boots a kernel that crashes again and again."""
    if not (folder / "grubenv").is_file():
        yield f"{folder}/grubenv does not exist: grub-editenv {folder}/grubenv create"
        return
    kind = first_line(["grub-probe", "--target=fs", str(folder)])
    abstraction = first_line(["grub-probe", "--target=abstraction", str(folder)])
    if kind is None or abstraction is None:
        yield f"grub-probe cannot tell what {folder} is on, so whether GRUB can write there"
    elif kind not in grub.WRITABLE or abstraction:
        yield (
            f"GRUB cannot write to {folder} ({abstraction or kind}), so it would boot a kernel that"
            " crashes again and again: put /boot on a partition with ext4"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _efi_variable(root: Path, name: str) -> bytes:
    try:
        return (root / "sys/firmware/efi/efivars" / name).read_bytes()[4:]
    except OSError:
        return b""
