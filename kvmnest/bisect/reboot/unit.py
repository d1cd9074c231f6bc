"""The systemd unit that goes on after a restart."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmnest.errors import UsageError

NAME = "kvmnest-bisect.service"

_TEXT = """\
# Written by kvmnest bisect, which removes it at its end (kvmnest bisect stop: before that).
[Unit]
Description=kvmnest bisect goes on after the restart
After=multi-user.target network-online.target
Wants=network-online.target
ConditionPathExists={state}

[Service]
Type=oneshot
# A kernel may have to be built.
TimeoutStartSec=infinity
WorkingDirectory={folder}
Environment={environment}
ExecStart={command}

[Install]
WantedBy=multi-user.target
"""


def text(arguments: Sequence[str], state: Path) -> str:
    """The unit that runs ``kvmnest ARGUMENTS`` as we were run, while the file ``state`` exists.

    Raises UsageError if a path cannot be written in a unit.
    """
    command = [sys.executable, "-m", "kvmnest", *arguments]
    names = ("PATH", "HOME", "XDG_CACHE_HOME", "LANG")
    environment = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return _TEXT.format(
        state=_specifiers(str(state)),
        folder=_specifiers(os.getcwd()),
        environment=" ".join(_word(setting) for setting in environment),
        command=" ".join(_word(word).replace("$", "$$") for word in command),
    )


def _specifiers(value: str) -> str:
    if any(ord(character) < 0x20 for character in value):
        raise UsageError(f"{value!r} cannot stand in a systemd unit")
    return value.replace("%", "%%")


def _word(value: str) -> str:
    quoted = _specifiers(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'
