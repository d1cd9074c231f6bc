"""Which emulators are at hand, which the lab uses, and what each CPU model offers to kvm_intel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest.errors import KvmnestError, first_line
from kvmnest.lab import bochs, bochs_build, cache, cpu_models, kernels
from kvmnest.lab.emulators import Choice
from kvmnest.lab.errors import LabRunError, LabSetupError
from kvmnest.lab.machine import Lab

_FORMAT = 1
_KEPT = 200
# CPU features beside VMX on which what L1 gets depends, as Linux calls them.
_FEATURES = (
    "xsaves", "pku", "pks", "shstk", "user_shstk", "ibt", "la57", "umip", "mpx", "waitpkg",
    "avx512f", "x2apic", "tsc_adjust", "invpcid", "pcid", "smap", "fsgsbase", "rdrand",
)  # fmt: skip
_ASK = f"""
import json, os, sys
wanted = {_FEATURES!r}
lines = open("/proc/cpuinfo").read().partition("\\n\\n")[0].splitlines()
info = {{key.strip(): value.split() for key, _, value in (line.partition(":") for line in lines)}}
folder, params = "/sys/module/kvm_intel/parameters", {{}}
for name in sorted(os.listdir(folder)):
    with open(f"{{folder}}/{{name}}") as file:
        params[name] = file.read().strip()
json.dump({{
    "cpu": " ".join(info["model name"]), "vmx_flags": info.get("vmx flags", []),
    "features": [name for name in wanted if name in info["flags"]], "params": params,
}}, sys.stdout)
"""


@dataclass(frozen=True)
class Found:
    """An emulator at hand: where it comes from, whether it is used, and why or why not.

    ``emulator`` is None if it cannot be used at all; ``why`` says why.
    """

    origin: str
    path: str
    emulator: bochs.Emulator | None
    used: bool
    why: str


@dataclass(frozen=True)
class Offered:
    """What a CPU model offers to kvm_intel, in Linux's words; ``problem`` if it does not boot."""

    model: str
    cpu: str = ""
    vmx_flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    params: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def emulators(given: str | None = None) -> list[Found]:
    """All at hand, ``given`` being the user's; the one that a lab of one CPU uses is ``used``.

    Raises LabSetupError if the user's cannot be used.
    """
    found: list[Found] = []

    def add(origin: str, path: str | None, why_used: str, why_not: str) -> None:
        used = not any(entry.used for entry in found)
        try:
            emulator = bochs.locate(path)
        except KvmnestError as error:
            if path == given:
                raise
            found.append(Found(origin, path or "bochs", None, False, str(error)))
            return
        why = why_used if used else why_not
        found.append(Found(origin, emulator.path, emulator, used, why))

    if given:
        add("given", given, "--bochs names it", "")
    one, several = (bochs_build.built_for_the_lab(smp) for smp in (False, True))
    if one is not None:
        add("built here", str(one), "built for this CPU", "--bochs names another")
    if several is not None:
        add("built here, SMP", str(several), "built for this CPU", "only for more than one CPU")
    add("in PATH", "bochs", "none was built here: kvmnest lab build", "the one above is preferred")
    return found


def offers(emulator: bochs.Emulator, kernel: str | None = None) -> Iterator[Offered]:
    """What each CPU model with VMX offers, oldest first; a boot each, unless it is known.

    Raises LabSetupError, KernelSpecError.
    """
    kernels.resolve(kernel)
    for model in cpu_models.usable(emulator.version, emulator.models):
        try:
            told = _offered(bochs.locate(emulator.path, model.name), kernel)
        except (LabRunError, LabSetupError) as error:
            yield Offered(model.name, problem=first_line(error))
            continue
        yield Offered(
            model.name,
            told["cpu"],
            tuple(told["vmx_flags"]),
            tuple(told["features"]),
            tuple(told["params"].items()),
        )


def cpu_flags(choice: Choice, kernel: str | None = None) -> str:
    """Flags of the CPU that ``choice`` gives, as far as ``offers`` knows them; a boot, once.

    Raises LabRunError, LabSetupError, KernelSpecError.
    """
    told = _offered(bochs.locate(choice.program, choice.cpu_model), kernel)
    return " ".join([*told["vmx_flags"], *told["features"]])


def _offered(emulator: bochs.Emulator, kernel: str | None) -> dict[str, Any]:
    """What the guest says of its CPU, from the cache if it was asked before."""
    key = cache.digest([
        _FORMAT, emulator.stamp(), bochs.configuration(emulator, 0, 1), emulator.kernel_parameters,
        kernels.resolve(kernel).key, _ASK,
    ])  # fmt: skip

    def build(to: Path) -> None:
        (to / "offered.json").write_bytes(_ask(emulator, kernel))

    folder = cache.entry("probes", key, build, keep=_KEPT)
    found: dict[str, Any] = json.loads((folder / "offered.json").read_text())
    return found


def _ask(emulator: bochs.Emulator, kernel: str | None) -> bytes:
    choice = Choice(program=emulator.path, cpu_model=emulator.model.name)
    lab = Lab(kernel, emulator=choice, snapshots=False)
    return lab.output(["python3", "-c", _ASK], f"reading what {emulator.model.name} offers")
