"""Basic blocks of KVM that have run, from instrumented modules (see ``kvmnest coverage``)."""

from __future__ import annotations

import os
import struct
from typing import Any

DEVICE = "/dev/kvmnest-coverage"
_MODULES = ("kvm", "kvm_intel")
_CHUNK = 1 << 16


class Covered:
    """Reads which blocks have run since the last look.

    Raises OSError if the device or the modules' addresses cannot be read.
    """

    def __init__(self) -> None:
        self._device = os.open(DEVICE, os.O_RDONLY | os.O_CLOEXEC)
        self._sections: dict[str, dict[str, int]] = _sections()

    def news(self) -> dict[str, Any]:
        """``new``: addresses of blocks that ran for the first time since the last call.

        The first call has ``sections`` too: where the sections of each module are. ``lost`` says
        why they are not all, "" if they are.
        """
        found: dict[str, Any] = {"new": [], "sections": self._sections, "lost": ""}
        self._sections = {}
        try:
            while data := os.read(self._device, _CHUNK):
                found["new"] += struct.unpack(f"={len(data) // 8}Q", data)
        except OSError as error:
            found["lost"] = error.strerror
        return found


def opened() -> Covered | None:
    """A reader if the kernel's KVM is instrumented, else None."""
    return Covered() if os.path.exists(DEVICE) else None


def _sections() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for module in _MODULES:
        folder = f"/sys/module/{module}/sections"
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if "text" in name:
                with open(f"{folder}/{name}", encoding="ascii") as file:
                    found.setdefault(module, {})[name] = int(file.read(), 16)
    return found
