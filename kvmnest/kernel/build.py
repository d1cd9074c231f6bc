"""Build kvm.ko and kvm-intel.ko from edited sources of a Debian kernel.

The unedited tree is built once for each kernel (about 45 s) and kept with its object files. A
build with edits copies that tree, so only what the edits touch is compiled again (about 10 s),
and several builds can run at a time. Results are kept too: the same edits build nothing twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvmnest import scratch
from kvmnest.errors import KvmnestError, UsageError
from kvmnest.kernel import source
from kvmnest.kernel.edits import Edit, apply_all
from kvmnest.lab import cache, modules, tools
from kvmnest.lab.errors import LabSetupError

_FORMAT = 2
_KEPT_BUILDS = 400
#: Where the sources of KVM for x86 are, below a kernel's top folder.
KVM = "arch/x86/kvm"
_MODULES = ("kvm.ko", "kvm-intel.ko")

# Debug information costs a third of the time and the lab drops it; an edit that leaves a function
# without a caller is no error.
_SETTINGS = (
    "CONFIG_KVM_AMD=",
    "CONFIG_DEBUG_INFO=",
    "CONFIG_DEBUG_INFO_BTF=",
    "CONFIG_DEBUG_INFO_BTF_MODULES=",
    "CONFIG_KVM_WERROR=",
)


_running: set[subprocess.Popen[bytes]] = set()


class BuildError(KvmnestError):
    """The edited source does not compile. The message has the compiler's first error."""


def build_modules(edits: Sequence[Edit], release: str) -> Path:
    """Folder with stripped kvm.ko and kvm-intel.ko for a Debian kernel ``release``.

    Without edits these are the modules as shipped, compiled here. Raises EditError if an edit
    does not match the source, BuildError if the result does not compile, LabSetupError if
    packages or tools are missing or the disk is full.
    """
    kernel = source.prepare(release)
    words = [part for e in edits for part in (e.file, e.function, e.expression, e.replacement)]
    key = cache.digest(
        [_FORMAT, kernel.key, kernel.compiler, *(" ".join(word.split()) for word in words)]
    )

    def keep(folder: Path, built: Path) -> None:
        for name in _MODULES:
            (folder / name).write_bytes(modules.lean(built / KVM / name))

    kept = cache.existing("kvm-modules", key)
    if kept is not None:
        return kept
    if not edits:
        base = _base(kernel)
        return cache.entry("kvm-modules", key, lambda to: keep(to, base), keep=_KEPT_BUILDS)
    with rebuilt(kernel, lambda tree: apply_all(edits, tree)) as tree:
        return cache.entry("kvm-modules", key, lambda to: keep(to, tree), keep=_KEPT_BUILDS)


@contextlib.contextmanager
def rebuilt(kernel: source.KernelSource, change: Callable[[Path], None]) -> Iterator[Path]:
    """A copy of a kernel's built tree, changed and built again, for as long as the block runs.

    Its modules have their symbols and debug information. Raises what ``change`` does, BuildError
    if the result does not compile, LabSetupError if the disk is full.
    """
    base = _base(kernel)
    try:
        with scratch.folder(cache.root()) as folder:
            tree = Path(folder) / "tree"
            _copy_built(base, tree)
            change(tree)
            _make(kernel, tree)
            yield tree
    except OSError as error:
        raise LabSetupError(cache.describe(error, "building kernel modules")) from error


def require_source(tree: Path) -> None:
    """Raise UsageError unless ``tree`` looks like a kernel's source."""
    if not (tree / KVM / "Makefile").is_file():
        raise UsageError(f"{tree} is not a kernel source: it has no {KVM}")


def build_tree(tree: Path, release: str, to: Path) -> None:
    """Compile the KVM of a source ``tree`` for a Debian kernel and put both modules into ``to``.

    ``tree`` has arch/x86/kvm and virt/kvm, as close to the kernel's own source as the change
    under test allows. Only files that differ from that source are compiled again. Raises
    UsageError for what is not a source, BuildError if it does not compile, LabSetupError as
    ``build_modules``.
    """
    require_source(tree)
    kernel = source.prepare(release)

    def overlay(work: Path) -> None:
        for folder in (KVM, "virt/kvm"):
            for path in sorted((tree / folder).rglob("*")):
                name = path.relative_to(tree)
                if path.is_file() and path.suffix in (".c", ".h", ".S"):
                    _overlay(path, kernel.tree / name, work / name)

    cache.tell("compiling KVM with what is changed: some seconds to a minute")
    try:
        with rebuilt(kernel, overlay) as work:
            to.mkdir(parents=True, exist_ok=True)
            for module in _MODULES:
                (to / module).write_bytes(modules.lean(work / KVM / module))
    except BuildError as error:
        raise BuildError(f"{error}{_other_series(tree, release)}") from error


def _other_series(tree: Path, release: str) -> str:
    """A hint if a source tree says that it is of another version than the kernel."""
    try:
        text = (tree / "Makefile").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    numbers = re.findall(r"^(?:VERSION|PATCHLEVEL) = (\d+)$", text, re.MULTILINE)
    series = ".".join(numbers)
    if len(numbers) != 2 or re.match(rf"{series}\b", release):
        return ""
    return f" (the source is {series}, the kernel {release}: name a nearer one with --kernel)"


def _overlay(path: Path, shipped: Path, target: Path) -> None:
    """Take a source file over if it is not what was shipped: its object file is old then."""
    content = path.read_bytes()
    if not shipped.is_file() or shipped.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def check_edits(edits: Sequence[Edit], release: str) -> None:
    """Raise EditError if an edit does not match the source of ``release``."""
    tree = source.prepare(release).tree
    for edit in edits:
        edit.apply((tree / edit.file).read_text(encoding="utf-8"))


def end_builds() -> None:
    """End the builds that run in other threads: each raises BuildError there."""
    for process in tuple(_running):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _base(kernel: source.KernelSource) -> Path:
    """The tree of a kernel with everything built; ``built-at`` says where the build ran."""

    def build(folder: Path) -> None:
        tree = folder / "tree"
        shutil.copytree(kernel.tree, tree, symlinks=True)
        makefile = tree / KVM / "Makefile"
        text = makefile.read_text().replace("$(srctree)/virt/kvm", "$(src)/../../../virt/kvm")
        # The headers have no KVM folder; its trace headers are found relative to the second one.
        text = re.sub(r"-I ?\$\(srctree\)/arch/x86/kvm", "-I $(src) -I $(src)/..", text)
        text = text.replace("$(srctree)/arch/x86/kvm", "$(src)")
        makefile.write_text(text)
        _make(kernel, tree)
        (tree / "built-at").write_text(str(tree))

    return (
        cache.entry(
            "kvm-trees", cache.digest([_FORMAT, kernel.key, kernel.compiler, *_SETTINGS]), build
        )
        / "tree"
    )


def _copy_built(base: Path, tree: Path) -> None:
    """Copy a built tree so that make takes its object files as its own.

    The time stamps stay, and the notes that kbuild leaves beside each object file, which hold
    absolute paths, get the new path.
    """
    shutil.copytree(base, tree, symlinks=True)
    old = (tree / "built-at").read_text().encode()
    for path in (*tree.rglob(".*.cmd"), *tree.rglob("*.mod"), *tree.rglob("modules.order")):
        status = path.stat()
        path.write_bytes(path.read_bytes().replace(old, str(tree).encode()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _make(kernel: source.KernelSource, tree: Path) -> None:
    jobs = 1 if (tree / "built-at").exists() else os.cpu_count() or 1
    argv = [
        "make", "-s", f"-j{jobs}", "-C", str(kernel.headers), f"M={tree / KVM}",
        f"CC={kernel.compiler}", *_SETTINGS, "modules",
    ]  # fmt: skip
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    process = tools.start(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    _running.add(process)
    try:
        _, errors = process.communicate()
    except BaseException:
        _end(process)
        raise
    finally:
        _running.discard(process)
    if process.returncode:
        lines = errors.decode(errors="replace").splitlines()
        if any("No space left on device" in line for line in lines):
            raise LabSetupError("no space left on the disk while building kernel modules")
        told = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise BuildError(f"building KVM failed: {told[0].replace(str(tree), '').lstrip('/')}")
