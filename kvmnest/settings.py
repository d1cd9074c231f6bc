"""Named settings: sets of module parameters of KVM under which the suite is worth running.

They stand in ``kvmnest/data/settings.toml``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.known import kernel_in_range

ALL = "all"
_FILE = Path(__file__).parent / "data" / "settings.toml"


@dataclass(frozen=True)
class Setting:
    """Parameters of kvm_intel and kvm under one name.

    ``files`` are patterns of the suite's files whose cases can answer differently; ``kernels`` is
    a range and ``cpu_lacks`` a flag of /proc/cpuinfo, see known.toml.
    """

    name: str
    params: Mapping[str, str]
    why: str = ""
    kernels: str = "any"
    cpu_lacks: str = ""
    files: Sequence[str] = ("*",)

    def exists_on(self, release: str) -> bool:
        """Whether a kernel of this release has the parameters."""
        return kernel_in_range(release, self.kernels)

    def why_left_out(self, release: str, cpu_flags: str) -> str:
        """Why nothing can be run under it on this kernel and CPU; "" if it can."""
        if not self.exists_on(release):
            return "this kernel has no such parameter"
        if self.cpu_lacks and self.cpu_lacks in cpu_flags.split():
            return f"of no use on a CPU with {self.cpu_lacks}: {self.why}"
        return ""


#: No parameter is set.
DEFAULT = Setting("", {})


@functools.cache
def every() -> tuple[Setting, ...]:
    """All settings, in the order of the file. Raises HarnessError if it is damaged."""
    try:
        return tuple(Setting(**entry) for entry in reading.toml(_FILE)["setting"])
    except (KeyError, TypeError) as error:
        raise HarnessError(f"{_FILE} is not a list of settings: {error}") from error


def choose(names: Sequence[str]) -> tuple[Setting, ...]:
    """The settings of these names; all of them for "all".

    Raises UsageError for another name, or one that is given twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--settings {name} is given more than once")
    if list(names) == [ALL]:
        return every()
    known = {setting.name: setting for setting in every()}
    for name in names:
        if name not in known:
            raise UsageError(f"no setting is called {name} ({', '.join(known)}, or {ALL} alone)")
    return tuple(known[name] for name in names)
