"""Kernel modules: what a .ko needs, in which order to load, and a lean copy for the guest."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from kvmnest import reading, scratch
from kvmnest.lab import tools
from kvmnest.lab.decompress import decompress
from kvmnest.lab.errors import KernelSpecError

_LARGEST = 512 << 20  # bytes, with debug information
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")

# Sections that only ORC unwinding, ftrace and BTF use. Loading kvm.ko takes 0.5 s without and
# 2.4 s with them at the lab's speed.
_DROP = (
    ".BTF", ".BTF.base", ".orc_unwind", ".orc_unwind_ip", ".rela.orc_unwind_ip", ".orc_header",
    "__mcount_loc", ".rela__mcount_loc",
)  # fmt: skip


def canonical(name: str) -> str:
    """Module name as the kernel spells it: ``kvm-intel.ko.xz`` -> ``kvm_intel``."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name.replace("-", "_")


@dataclass(frozen=True)
class Module:
    """A module file: kernel-style name, names of modules it depends on, vermagic, parameters."""

    name: str
    path: Path
    depends: tuple[str, ...]
    vermagic: str
    parameters: frozenset[str]


def read(path: Path) -> Module:
    """Read the .modinfo of a module file. Raises KernelSpecError if it is not a module."""
    try:
        content = decompress(reading.data(path, limit=_LARGEST))
    except KernelSpecError as e:
        raise KernelSpecError(f"{path}: {e}") from e
    try:
        elf = ELFFile(io.BytesIO(content))
        section = elf.get_section_by_name(".modinfo")
        data = bytes(section.data()) if section is not None else b""
    except Exception as e:  # of a damaged file pyelftools raises what it runs into
        raise KernelSpecError(f"{path} is not a kernel module ({reading.one_line(e)})") from e
    fields: dict[str, list[str]] = {}
    for item in data.decode(errors="replace").split("\0"):
        key, _, value = item.partition("=")
        fields.setdefault(key, []).append(value)
    if "vermagic" not in fields:
        raise KernelSpecError(f"{path} is not a kernel module (it has no vermagic)")
    depends = tuple(d.replace("-", "_") for d in fields.get("depends", [""])[0].split(",") if d)
    parameters = frozenset(p.partition(":")[0] for p in fields.get("parmtype", []))
    return Module(canonical(path.name), path, depends, fields["vermagic"][0], parameters)


def find(folder: Path) -> dict[str, Path]:
    """All module files below ``folder`` by kernel-style name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.ko*")):
        if path.name.endswith(SUFFIXES) and path.is_file():
            found.setdefault(canonical(path.name), path)
    return found


def load_order(
    wanted: Sequence[str], files: Mapping[str, Path], builtin: frozenset[str], where: str
) -> list[Module]:
    """The modules to load for ``wanted``, dependencies first, what is built in left out.

    Raises KernelSpecError for a module that is neither in ``files`` nor built in.
    """
    order: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name in builtin or name in order:
            return
        if name not in files:
            raise KernelSpecError(f"{where} has no module {name}")
        module = read(files[name])
        for dependency in module.depends:
            visit(dependency)
        order[name] = module

    for name in wanted:
        visit(name)
    return list(order.values())


def builtin_names(listing: str) -> frozenset[str]:
    """Module names from the text of a ``modules.builtin`` file."""
    return frozenset(canonical(Path(line).name) for line in listing.split())


def lean(path: Path) -> bytes:
    """The module without symbols and sections the lab does not use (and so unsigned)."""
    with scratch.folder() as folder:
        source, target = Path(folder) / "in.ko", Path(folder) / "out.ko"
        source.write_bytes(decompress(path.read_bytes()))
        drop = [f"--remove-section={name}" for name in _DROP]
        tools.run(
            ["objcopy", "--strip-unneeded", *drop, str(source), str(target)],
            f"stripping {path.name}",
        )
        return target.read_bytes()
