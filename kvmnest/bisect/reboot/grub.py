"""GRUB's menu: which entry boots which kernel, and the settings that a bisection needs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from kvmnest.errors import HarnessError

_BLOCK = re.compile(r"(menuentry|submenu)\s.*\{$")
_IMAGE = re.compile(r"linux(?:efi|16)?\s+(?:\S*/)?vmlinuz-(\S+)")

#: Filesystems on which GRUB can change a file in place, as grub-probe calls them.
WRITABLE = ("ext2", "fat", "xfs")


@dataclass(frozen=True)
class Entry:
    """A menu entry: its ids from the outermost submenu on, as grub-reboot takes them."""

    path: str
    release: str


def entries(menu: str) -> list[Entry]:
    """The entries of a grub.cfg that boot a kernel, in their order."""
    found = []
    stack: list[str] = []  # ids of the blocks that we are in, "" for those of another kind
    for raw in menu.splitlines():
        line = raw.strip()
        if _BLOCK.match(line):
            stack.append(_id(line))
        elif line.endswith("{"):
            stack.append("")
        elif line == "}" and stack:
            stack.pop()
        image = _IMAGE.match(line)
        if image and stack:
            found.append(Entry(">".join(part for part in stack if part), image[1]))
    return found


def _id(line: str) -> str:
    """The id of a block, or its title where it has none."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    for option in ("$menuentry_id_option", "--id"):
        if option in words[:-1]:
            return words[words.index(option) + 1]
    return words[1]


def entry(menu: str, release: str) -> str | None:
    """The entry that boots a kernel as its own, not for rescue; None if there is none."""
    wanted = f"gnulinux-{release}-advanced-"
    own = [found.path for found in entries(menu) if found.release == release]
    return next((path for path in own if path.rpartition(">")[2].startswith(wanted)), None)


def settings(parameters: list[str]) -> str:
    """A file for /etc/default/grub.d: the default is what we save, and kernels get parameters.

    A default by number would be another kernel as soon as one is installed.
    """
    line = " ".join(parameters)
    return (
        "# Written by kvmnest bisect, which removes it at its end.\n"
        "GRUB_DEFAULT=saved\n"
        "GRUB_SAVEDEFAULT=false\n"
        f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {line}"\n'
    )


def require_one_time_choice(menu: str, where: Path) -> None:
    """Raise HarnessError unless a menu boots a choice once and else what is saved."""
    lines = [line.strip() for line in menu.splitlines()]
    wanted = (
        'set default="${next_entry}"',
        "save_env next_entry",
        'set default="${saved_entry}"',
    )
    missing = [line for line in wanted if line not in lines]
    if missing:
        raise HarnessError(
            f"{where} does not boot a kernel only once (it has no {missing[0]!r}):"
            " is it made by grub-mkconfig?"
        )
