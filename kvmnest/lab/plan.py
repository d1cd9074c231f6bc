"""Which modules the guest loads, with which parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmnest.errors import UsageError
from kvmnest.lab import cache, kernels, modules
from kvmnest.lab.errors import KernelSpecError


def replacements(folder: Path) -> list[modules.Module]:
    """The user's own KVM modules, and those beside them that they need.

    Raises KernelSpecError if there is none that can be used.
    """
    if not folder.is_dir():
        raise KernelSpecError(f"{folder}: no such directory")
    files = modules.find(folder)
    found: dict[str, modules.Module] = {}
    todo = [name for name in files if name in kernels.MODULES]
    if not todo:
        raise KernelSpecError(f"{folder} has no kvm.ko or kvm-intel.ko")
    while todo:
        name = todo.pop()
        if name in files and name not in found:
            found[name] = modules.read(files[name])
            todo += found[name].depends
    return list(found.values())


def require_built_for(kernel: kernels.Kernel, replaced: Sequence[modules.Module]) -> None:
    """Raise KernelSpecError unless the modules were built for this very kernel."""
    own = [modules.read(p).vermagic for n, p in kernel.modules.items() if n in kernels.MODULES]
    for module in replaced:
        if own and module.vermagic.split() != own[0].split():
            raise KernelSpecError(
                f"{module.path} was built for {module.vermagic.strip()},"
                f" the kernel is {own[0].strip()}"
            )


def plan(
    kernel: kernels.Kernel, files: Mapping[str, Path], params: Mapping[str, str]
) -> tuple[list[modules.Module], dict[str, str]]:
    """Modules in load order, and the parameter line of each. Raises UsageError, KernelSpecError."""
    where = f"kernel {kernel.release}"
    order = modules.load_order(kernels.MODULES, files, kernel.builtin, where)
    known = {m.name: m.parameters for m in order}
    lines: dict[str, list[str]] = {}
    for name, value in params.items():
        module, dot, parameter = name.replace("kvm-intel.", "kvm_intel.").rpartition(".")
        if not dot:
            module = "kvm" if parameter in known.get("kvm", ()) else "kvm_intel"
        if module not in kernels.MODULES:
            raise UsageError(f"{name}: the lab sets parameters of kvm and kvm_intel only")
        if module in known and parameter not in known[module]:
            raise KernelSpecError(f"{module} of {where} has no parameter {parameter}")
        lines.setdefault(module, []).append(f"{parameter}={value}")
    return order, {module: " ".join(line) for module, line in lines.items()}


def module_files(order: Sequence[modules.Module]) -> dict[str, bytes]:
    """The modules as the guest gets them: path -> content without what is not needed."""
    contents = {m.name: m.path.read_bytes() for m in order}
    key = cache.digest([2, *(part for item in contents.items() for part in item)])

    def build(folder: Path) -> None:
        for module in order:
            (folder / f"{module.name}.ko").write_bytes(modules.lean(module.path))

    folder = cache.entry("modules", key, build)
    return {module_path(m.name): (folder / f"{m.name}.ko").read_bytes() for m in order}


def module_path(name: str) -> str:
    """Where a module is in the guest."""
    return f"/modules/{name}.ko"
