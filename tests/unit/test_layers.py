"""The parts of the package stand in one order, and nothing imports upward."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvmnest

ROOT = Path(kvmnest.__file__).parent

# From the ground up: each part (a folder or a module) may import those before it, so there are no
# circles between parts. An import inside a function or for type checkers counts like any other.
ORDER = (
    *("schema", "errors", "reading", "files", "scratch", "anchors", "known", "settings"),
    *("kvm", "host", "vmx", "l1", "disassembly", "kmsg", "kernel_reports"),
    *("cases", "bench", "lab", "reference", "plugin", "light", "suite"),
    *("reports", "run", "trace", "kernel", "fuzz", "coverage", "repro", "found", "mutants"),
    *("doctor", "shell", "bisect", "matrix", "cli", "__main__"),
)

# Parts that may import less than all that stands before them.
ALLOWED = {
    "kvm": {"errors"},
    "vmx": set(),
    "l1": {"errors", "scratch", "kvm", "vmx"},
    "suite": {"errors", "kvm", "vmx", "l1"},
}

# What would make the architecture's data do I/O.
IO_MODULES = {"os", "io", "socket", "subprocess", "mmap", "fcntl", "pathlib", "cffi", "ctypes"}


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute names of all that a source imports; ``from x import y`` as x and as x.y."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join((*parents, base) if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(), path.relative_to(ROOT.parent).with_suffix("").parts[:-1])


def files_of(part: str) -> list[Path]:
    module = ROOT / f"{part}.py"
    return [module] if module.is_file() else sorted((ROOT / part).rglob("*.py"))


def parts_used(path: Path) -> set[str]:
    """Parts of the package that a file imports ("kvm", "vmx", ...)."""
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("kvmnest.")}
    return used & {*ORDER}


@pytest.mark.parametrize("part", ORDER)
def test_nothing_imports_upward(part: str) -> None:
    files = files_of(part)
    assert files
    below = ALLOWED.get(part, {*ORDER[: ORDER.index(part)]}) | {part}
    wrong = {str(path.relative_to(ROOT)): sorted(parts_used(path) - below) for path in files}
    assert {name: parts for name, parts in wrong.items() if parts} == {}


def test_every_part_has_a_place() -> None:
    parts = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    parts |= {p.stem for p in ROOT.glob("*.py")}
    # The package itself, and settings of Sphinx.
    assert parts - {"__init__", "docs"} == {*ORDER}
    assert len(ORDER) == len({*ORDER})


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package is the face of its modules, and counts not."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[1] != "docs" and parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


def uses() -> dict[str, set[str]]:
    """The modules that each module imports."""
    found = modules()
    return {name: imports_of(path) & found.keys() - {name} for name, path in found.items()}


def test_no_two_modules_import_each_other() -> None:
    """Not in a longer circle either, nor inside a function or for type checkers."""
    try:
        TopologicalSorter(uses()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_architecture_does_no_io() -> None:
    for path in (ROOT / "vmx").rglob("*.py"):
        used = {name.split(".")[0] for name in imports_of(path)} & IO_MODULES
        assert not used, f"{path.relative_to(ROOT)} imports {used}"
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print", "input"}, path.relative_to(ROOT)


def test_the_bindings_know_nothing_of_vmx() -> None:
    # KVM's own interface (cdef, capability names) has names of it; the functions do not.
    for path in (ROOT / "kvm").rglob("*.py"):
        names = {
            node.name.lower()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert not {n for n in names if "vmx" in n or "vmcs" in n}, path.name


@pytest.mark.parametrize(
    "source",
    [
        "import kvmnest.l1.vm",
        "from kvmnest.l1 import machine",
        "from kvmnest import l1",
        "from ..l1 import machine",
        "from .. import l1",
        "def f():\n    import kvmnest.l1",
    ],
)
def test_every_spelling_of_an_import_is_seen(source: str) -> None:
    found = imports(source, ("kvmnest", "kvm"))
    assert any(name.split(".")[:2] == ["kvmnest", "l1"] for name in found)
