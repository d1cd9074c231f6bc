"""Known deviations: cases of which it is recorded that some kernels fail them, and why.

The record is ``kvmnest/data/known.toml``, a list of tables::

    [[deviation]]
    case = "test_exits.py::test_pause*"   # fnmatch pattern on the case id
    target = "any"                        # "any" (a KVM), "kvm", "lab" or "qemu"; "reference": the
                                          # bare CPU, where those with an emulator count, too
    kernels = ">=6.1,<6.13"               # or "any"
    emulator = "bochs <3.0-26"            # optional: the emulator is at fault, or is needed to see
                                          # it; never true on a real CPU. 3.0-26 is 3.0 with 26
                                          # repairs, as kvmnest lab build makes it
    hidden_by = "bochs <3"                # optional: an emulator with which it does not happen
    cpu_lacks = "umip"                    # optional: only CPUs without this flag of /proc/cpuinfo
    cpu_has = "posted_intr"               # optional: only CPUs with it (both know "vmx flags", too)
    params = { ept = "N" }                # optional: kvm_intel parameters it depends on, and
                                          # nested_roundtrip for that option of the run
    reason = "what is seen, in one sentence"
    upstream = "KVM: nVMX: subject of the commit"   # optional
    crash = true                          # optional: the kernel or the emulator dies of the case;
                                          # without it such an end is an error, as one from outside
    kernel_message = "WARNING: * at *arch/x86/kvm/*"  # optional: the deviation is this report of
                                          # the kernel during the case (fnmatch pattern), no failure
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError

KNOWN_FILE = Path(__file__).parent / "data" / "known.toml"

#: The target without KVM.
REFERENCE = "reference"
_CONDITION = re.compile(r"(>=|<=|==|>|<)\s*(\d+(?:[.-]\d+)*)")
_TRUE, _FALSE = ("Y", "1"), ("N", "0")


def kernel_version(release: str) -> tuple[int, ...]:
    """Numbers at the start of a kernel release: "6.1.0-56-cloud-amd64" is (6, 1, 0, 56)."""
    found = re.match(r"\d+(?:[.-]\d+)*", release)
    return tuple(int(part) for part in re.split("[.-]", found.group())) if found else ()


def kernel_in_range(release: str, condition: str) -> bool:
    """Whether a kernel release meets a comma-separated list such as ">=6.1,<6.13" or is "any".

    Only as many numbers are compared as the condition states, so 6.1.0-56 meets "==6.1" and
    "<=6.1". Raises ValueError for a condition that cannot be read.
    """
    if condition.strip() == "any":
        return True
    version = kernel_version(release)
    for part in condition.split(","):
        found = _CONDITION.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"kernel range {condition!r}: cannot read {part.strip()!r}")
        operator, wanted = found[1], kernel_version(found[2])
        have = (version + (0,) * len(wanted))[: len(wanted)]
        met = {
            ">=": have >= wanted,
            "<=": have <= wanted,
            "==": have == wanted,
            ">": have > wanted,
            "<": have < wanted,
        }[operator]
        if not met:
            return False
    return True


def emulator_in_range(emulator: str, condition: str) -> bool:
    """Whether an emulator such as "bochs 3.0" meets a condition such as "bochs" or "bochs >=2,<3".

    No emulator (``""``, a real CPU) meets none. Raises ValueError for a condition that cannot be
    read.
    """
    name, _, version = emulator.partition(" ")
    wanted, _, versions = condition.strip().partition(" ")
    if not re.fullmatch(r"[a-z]+", wanted):
        raise ValueError(f"emulator {condition!r}: cannot read {wanted!r}")
    in_range = kernel_in_range(version, versions or "any")
    return name == wanted and in_range


def same_parameter(have: str | None, wanted: object) -> bool:
    """Compare a module parameter as sysfs shows it with a wanted value.

    True, "Y", "y" and 1 are the same, and so are False, "N", "n" and 0; everything else compares
    as text. A parameter that does not exist equals nothing.
    """
    if have is None:
        return False
    text = {True: "Y", False: "N"}[wanted] if isinstance(wanted, bool) else str(wanted)
    for group in (_TRUE, _FALSE):
        if have.upper() in group and text.upper() in group:
            return True
    return have == text


@dataclass(frozen=True)
class Deviation:
    """One entry of the record."""

    case: str
    reason: str
    target: str = "any"
    kernels: str = "any"
    emulator: str = ""
    hidden_by: str = ""
    cpu_lacks: str = ""
    cpu_has: str = ""
    params: Mapping[str, object] = field(default_factory=dict)
    upstream: str = ""
    kernel_message: str = ""
    crash: bool = False

    def applies(
        self,
        target: str,
        kernel: str,
        params: Mapping[str, str],
        emulator: str = "",
        cpu_flags: str = "",
    ) -> bool:
        """Whether the entry is about this target, kernel release, parameters, emulator and CPU.

        On the reference target there is no KVM: entries of its own and of the emulator are left,
        but not those that need parameters of KVM.
        """
        if target == REFERENCE:
            if self.target != REFERENCE and (not self.emulator or self.params):
                return False
            return not self.emulator or emulator_in_range(emulator, self.emulator)
        return (
            self.target in ("any", target)
            and not (self.cpu_lacks and self.cpu_lacks in cpu_flags.split())
            and not (self.cpu_has and self.cpu_has not in cpu_flags.split())
            and kernel_in_range(kernel, self.kernels)
            and (not self.emulator or emulator_in_range(emulator, self.emulator))
            and not (self.hidden_by and emulator_in_range(emulator, self.hidden_by))
            and all(same_parameter(params.get(name), value) for name, value in self.params.items())
        )

    @property
    def text(self) -> str:
        """Reason and upstream commit in one line."""
        return f'{self.reason} (upstream: "{self.upstream}")' if self.upstream else self.reason


class Known:
    """The deviations that apply to one run."""

    def __init__(self, deviations: Iterable[Deviation]) -> None:
        self.deviations = tuple(deviations)

    def match(self, case_id: str) -> Deviation | None:
        """Return the first entry that lists the case."""
        return next(self._entries(case_id, of_messages=False), None)

    def match_message(self, case_id: str, message: str) -> Deviation | None:
        """Return the first entry that lists this report of the kernel in the case."""
        for deviation in self._entries(case_id, of_messages=True):
            if fnmatch.fnmatchcase(message, literal_brackets(deviation.kernel_message)):
                return deviation
        return None

    def _entries(self, case_id: str, *, of_messages: bool) -> Iterator[Deviation]:
        for deviation in self.deviations:
            if bool(deviation.kernel_message) is of_messages and fnmatch.fnmatchcase(
                case_id, literal_brackets(deviation.case)
            ):
                yield deviation


def literal_brackets(pattern: str) -> str:
    """The fnmatch pattern for a pattern of case ids."""
    # Brackets are part of a parametrised id; fnmatch would take them for a character class.
    return pattern.replace("[", "[[]")


def load(
    target: str,
    kernel: str,
    params: Mapping[str, str],
    path: Path | None = None,
    *,
    emulator: str = "",
    cpu_flags: str = "",
) -> Known:
    """Read the record and keep what applies to a run.

    ``emulator`` is name and version of what emulates the CPU ("bochs 3.0"), "" for a real one;
    ``cpu_flags`` are those of /proc/cpuinfo.

    Raises HarnessError naming the file and the entry when the record is wrong. A file that does
    not exist is an empty record.
    """
    return Known(
        deviation
        for deviation in read(path or KNOWN_FILE)
        if deviation.applies(target, kernel, params, emulator, cpu_flags)
    )


def read(path: Path = KNOWN_FILE) -> list[Deviation]:
    """All entries of the record; raises as ``load`` does."""
    from kvmnest import reading  # the lab's guest, which reads no record, imports this module too

    try:
        document = reading.toml(path)
    except reading.NoSuchFile:
        return []
    entries = document.get("deviation", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise HarnessError(f"{path}: deviation is not a list of tables")
    return [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]


def _entry(path: Path, number: int, entry: dict[str, Any]) -> Deviation:
    where = f"{path}: deviation {number}"
    try:
        deviation = Deviation(**entry)
        kernel_in_range("0", deviation.kernels)
        for emulator in filter(None, (deviation.emulator, deviation.hidden_by)):
            emulator_in_range("", emulator)
    except TypeError as error:
        raise HarnessError(f"{where}: {str(error).removeprefix('Deviation.__init__() ')}") from None
    except ValueError as error:
        raise HarnessError(f"{where}: {error}") from None
    if deviation.target not in ("any", "kvm", "lab", "qemu", REFERENCE):
        raise HarnessError(
            f'{where}: target is "any", "kvm", "lab", "qemu" or "reference",'
            f" not {deviation.target!r}"
        )
    if not deviation.reason.strip():
        raise HarnessError(f"{where}: a deviation needs a reason")
    return deviation
