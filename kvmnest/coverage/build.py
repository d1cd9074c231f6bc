"""Build KVM's modules so that they tell which basic blocks run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvmnest.coverage import blocks
from kvmnest.errors import UsageError
from kvmnest.kernel import source
from kvmnest.kernel.build import KVM, rebuilt
from kvmnest.lab import cache, modules

#: The source files that are watched unless others are named.
USUAL = (f"{KVM}/vmx/nested.c", f"{KVM}/vmx/vmx.c")

_FORMAT = 2
_KEPT = 12
_COLLECTOR = "kvmnest-coverage"
_INSTRUMENTED = ("kvm", "kvm-intel")
# A block that has nothing else to do must not jump to the collector, but call it from its place.
_FLAGS = "-gdwarf-5 -g1 -fsanitize-coverage=trace-pc -fno-optimize-sibling-calls"


@dataclass(frozen=True)
class Source:
    """A watched source file: the line of each of its blocks, and (first line, name) of functions.

    ``places`` says where each block's address is: (module, section, offset).
    """

    lines: list[int]
    functions: list[tuple[int, str]]
    places: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Built:
    """Instrumented modules in ``folder``, of a kernel ``release`` and source ``version``."""

    folder: Path
    release: str
    version: str
    sources: dict[str, Source]


def build(names: Sequence[str], release: str) -> Built:
    """Build kvm.ko and kvm-intel.ko that watch source files, and the module that they report to.

    ``names`` are names that ``full_names`` gives. Raises UsageError for a source without code in
    these modules, BuildError or LabSetupError as kvmnest.kernel.build.build_modules does.
    """
    kernel = source.prepare(release)
    collector = files("kvmnest.data").joinpath(f"{_COLLECTOR}.c").read_bytes()
    key = cache.digest([_FORMAT, kernel.key, kernel.compiler, _FLAGS, collector, *names])

    def change(tree: Path) -> None:
        (tree / KVM / f"{_COLLECTOR}.c").write_bytes(collector)
        objects = [Path(name).relative_to(KVM).with_suffix(".o") for name in names]
        lines = [f"obj-m += {_COLLECTOR}.o", *(f"CFLAGS_{name} += {_FLAGS}" for name in objects)]
        with (tree / KVM / "Makefile").open("a", encoding="utf-8") as makefile:
            makefile.write("\n" + "".join(f"{line}\n" for line in lines))

    def make(to: Path) -> None:
        with rebuilt(kernel, change) as tree:
            for name in (*_INSTRUMENTED, _COLLECTOR):
                (to / f"{name}.ko").write_bytes(modules.lean(tree / KVM / f"{name}.ko"))
            (to / "sources.json").write_text(json.dumps(_sources(tree / KVM, names)))

    folder = cache.entry("coverage", key, make, keep=_KEPT)
    found = json.loads((folder / "sources.json").read_text())
    sources = {
        name: Source(
            each["lines"],
            [(line, function) for line, function in each["functions"]],
            [(module, section, offset) for module, section, offset in each["places"]],
        )
        for name, each in found.items()
    }
    for name in names:
        if not sources[name].lines:
            raise UsageError(f"--source {name}: no code of it is in kvm.ko or kvm-intel.ko")
    return Built(folder, kernel.release, kernel.version, sources)


def _sources(folder: Path, names: Sequence[str]) -> dict[str, dict[str, list[object]]]:
    found: dict[str, dict[str, list[object]]] = {
        name: {"lines": [], "functions": [], "places": []} for name in names
    }
    for module in _INSTRUMENTED:
        read = blocks.read(folder / f"{module}.ko")
        for block in read.blocks:
            if block.file in found:
                each = found[block.file]
                each["lines"].append(block.line)
                each["places"].append([modules.canonical(module), block.section, block.offset])
        for name in found.keys() & read.functions.keys():
            found[name]["functions"] += [list(function) for function in read.functions[name]]
    return found


def full_names(names: Sequence[str], release: str) -> list[str]:
    """Source files from the kernel's top folder, of names as "nested.c" or "vmx/nested.c".

    Raises UsageError for a name that no C file of arch/x86/kvm has, or more than one, and
    LabSetupError if the kernel's source cannot be had.
    """
    if not names:
        return list(USUAL)
    tree = source.prepare(release).tree
    every = sorted(str(path.relative_to(tree)) for path in (tree / KVM).rglob("*.c"))
    found: dict[str, None] = {}
    for name in names:
        matching = [path for path in every if f"/{path}".endswith(f"/{name.removeprefix('./')}")]
        if len(matching) != 1:
            which = f"is {' or '.join(matching)}" if matching else f"is not a C file of {KVM}"
            raise UsageError(f"--source {name}: it {which} of {release}")
        found[matching[0]] = None
    return list(found)
