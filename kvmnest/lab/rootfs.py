"""The guest's file system, in layers: Python, its packages, kvmnest itself, the job.

Each layer is one cpio archive, cached by what it is made from; the kernel unpacks them one after
the other. The guest executes some 100 million instructions a second, hence: compiled code only
(no source positions, no docstrings in the standard library), stripped binaries, few big files.
"""

import fnmatch
import functools
import importlib.metadata
import importlib.util
import marshal
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kvmnest
from kvmnest import scratch
from kvmnest.l1.build import build_if_stale
from kvmnest.lab import cache, tools
from kvmnest.lab.compiling import compile_sources, rewritten
from kvmnest.lab.cpio import Cpio, names
from kvmnest.lab.errors import LabSetupError

FORMAT = 2  # bump when the content of a layer changes for the same inputs
SITE = "site"  # packages live here; PYTHONPATH names it
PYTHON = "usr/bin/python3"
REWRITTEN = ("suite", "plugin", "repro/bugs")  # of kvmnest: pytest rewrites their assertions
_STDLIB = f"usr/lib/python{sys.version_info[0]}.{sys.version_info[1]}"

# Parts of the standard library that nothing in a kernel test needs.
_STDLIB_DROP = (
    "test/*", "*/test/*", "*/tests/*", "site-packages/*", "dist-packages/*", "idlelib/*",
    "tkinter/*", "turtle*", "lib2to3/*", "ensurepip/*", "venv/*", "distutils/*", "pydoc_data/*",
    "asyncio/*", "xmlrpc/*", "wsgiref/*", "mailbox.py", "imaplib.py", "smtpd.py", "_pyio.py",
    "__phello__*", "_sysconfigdata*", "config-*",
)  # fmt: skip
_ENCODINGS = {"__init__", "aliases", "utf_8", "latin_1", "ascii", "cp437", "idna",
              "raw_unicode_escape", "unicode_escape", "utf_16", "utf_32", "utf_8_sig"}  # fmt: skip
_EXTENSIONS_DROP = (
    "*test*", "_tkinter*", "_codecs_*", "_ssl*", "_sqlite3*", "_curses*", "_dbm*", "_gdbm*",
    "_hashlib*", "readline*", "nis*", "ossaudiodev*", "spwd*", "audioop*", "_crypt*",
)  # fmt: skip

ROOTS = ("cffi", "pytest", "pyelftools")
_SITE_DROP = (
    "*.py", "*.pyi", "*.h", "*.cfg", "*.dist-info/*", "*.pth", "pygments/lexers/*",
    "pygments/styles/*", "pygments/formatters/*", "pycparser/*", "*/__pycache__/*", "../*",
)  # fmt: skip
_SITE_KEEP = (
    "pygments/lexers/__init__.py", "pygments/lexers/_mapping.py", "pygments/lexers/python.py",
    "pygments/lexers/diff.py", "pygments/lexers/special.py", "pygments/styles/__init__.py",
    "pygments/styles/_mapping.py", "pygments/styles/default.py", "pygments/formatters/__init__.py",
    "pygments/formatters/_mapping.py", "pygments/formatters/terminal.py",
    "*.dist-info/METADATA", "*.dist-info/entry_points.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A cached archive: what it was made from, and where it is."""

    key: str
    path: Path

    def read(self) -> bytes:
        """The archive."""
        return self.path.read_bytes()


def _layer(kind: str, key: str, build: Callable[[Path], None]) -> Layer:
    return Layer(key, cache.entry(kind, key, build) / "layer.cpio")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stripped(path: Path) -> bytes:
    """The ELF file without symbols, which the guest would only copy around."""
    with scratch.folder() as folder:
        target = Path(folder) / "stripped"
        tools.run(["strip", "-o", str(target), str(path)], f"strip {path}")
        return target.read_bytes()


@functools.cache
def _interpreter_and_loader() -> tuple[Path, str]:
    """The real Python executable and the path of its dynamic loader."""
    exe = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    text = exe.read_bytes()[:8192]
    found = re.search(rb"/[\w./-]*ld-linux[\w.-]*", text)
    if found is None:
        raise LabSetupError(
            f"{exe} names no glibc loader: the lab needs a dynamically linked Python"
        )
    return exe, found[0].decode()


def libraries_of(binary: Path) -> list[Path]:
    """Shared libraries that ``binary`` loads, resolved by Python's own loader."""
    _, loader = _interpreter_and_loader()
    done = subprocess.run([loader, "--list", str(binary)], capture_output=True, check=False)
    if done.returncode:
        return []
    found = re.findall(r"=> (/\S+)", done.stdout.decode())
    return [Path(path) for path in found]


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    base = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(base):
        relative = Path(folder).relative_to(base)
        folders[:] = sorted(f for f in folders if f not in ("__pycache__", "site-packages"))
        for file in sorted(files):
            name = str(relative / file)
            if not name.endswith(".py") or _matches(name, _STDLIB_DROP):
                continue
            if relative.name == "encodings" and name[10:-3] not in _ENCODINGS:
                continue
            yield name, base / name


def _extension_files() -> list[Path]:
    folder = Path(sysconfig.get_config_var("DESTSHARED") or "")
    if not folder.is_dir():
        folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    return [f for f in sorted(folder.glob("*.so")) if not _matches(f.name, _EXTENSIONS_DROP)]


def _stamp(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        status = path.stat()
        yield f"{path} {status.st_size} {status.st_mtime_ns}"


def _add_pycs(archive: Cpio, where: str, files: list[tuple[str, Path]], level: int) -> None:
    jobs = [(str(path), name, level) for name, path in files]
    for (name, _), pyc in zip(files, compile_sources(jobs), strict=True):
        if pyc:
            archive.file(f"{where}/{name}c", pyc)


def _save(folder: Path, archive: Cpio) -> None:
    (folder / "layer.cpio").write_bytes(archive.finish())


def python_layer() -> Layer:
    """Interpreter, standard library, shared libraries."""
    exe, loader = _interpreter_and_loader()
    sources, extensions = list(_stdlib_files()), _extension_files()
    inputs = [exe, Path(loader), *(p for _, p in sources), *extensions]

    def build(folder: Path) -> None:
        archive = Cpio()
        for name in ("proc", "sys", "dev", "tmp", "run", "root"):
            archive.directory(name)
        archive.device("dev/console", 5, 1)
        archive.file(loader.lstrip("/"), stripped(Path(loader).resolve()), 0o755)
        archive.file(PYTHON, stripped(exe), 0o755)
        archive.symlink("usr/bin/python", "python3")
        archive.symlink(f"usr/bin/{Path(_STDLIB).name}", "python3")
        libraries = {lib.name: lib for binary in (exe, *extensions) for lib in libraries_of(binary)}
        for name, path in sorted(libraries.items()):
            archive.file(f"lib/{name}", stripped(path.resolve()), 0o755)
        for path in extensions:
            archive.file(f"{_STDLIB}/lib-dynload/{path.name}", stripped(path), 0o755)
        _add_pycs(archive, _STDLIB, sources, 2)
        _save(folder, archive)

    key = cache.digest([FORMAT, sys.version, *_stamp(inputs)])
    return _layer("python", key, build)


def _requirements(roots: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that ``roots`` need to run, themselves included."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            dist = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as e:
            raise LabSetupError(
                f"Python package {name} is not installed: pip install {name}"
            ) from e
        found[name] = dist
        for text in dist.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def site_layer() -> Layer:
    """The packages that kvmnest runs on: compiled modules, extension modules, entry points."""
    files: dict[str, Path] = {}
    for _, dist in sorted(_requirements(ROOTS).items()):
        for file in dist.files or ():
            name = str(file)
            source = name.endswith(".py") and not _matches(name, _SITE_DROP[1:])
            if source or _matches(name, _SITE_KEEP) or not _matches(name, _SITE_DROP):
                files[name] = Path(str(dist.locate_file(file)))

    def build(folder: Path) -> None:
        archive = Cpio()
        archive.directory(SITE)
        python = [(n, p) for n, p in sorted(files.items()) if n.endswith(".py")]
        libraries: dict[str, Path] = {}
        for name, path in sorted(files.items()):
            if name.endswith(".so") or ".so." in name:
                archive.file(f"{SITE}/{name}", stripped(path), 0o755)
                libraries |= {lib.name: lib for lib in libraries_of(path)}
            elif not name.endswith(".py"):
                archive.file(f"{SITE}/{name}", path.read_bytes())
        present = {Path(name).name for name in (*files, *names(python_layer().read()))}
        for name, path in sorted(libraries.items()):
            if name not in present:
                archive.file(f"lib/{name}", stripped(path.resolve()), 0o755)
        _add_pycs(archive, SITE, python, 0)
        _save(folder, archive)

    key = cache.digest([FORMAT, sys.version, *sorted(files), *_stamp(files.values())])
    return _layer("site", key, build)


def boot_layer() -> Layer:
    """The first process: as little of kvmnest as it needs, in a place of its own.

    All of kvmnest comes with the job, so that an edit of it does not make a new boot.
    """
    base = Path(kvmnest.__file__).parent
    sources = [base / name for name in _BOOT_MODULES]

    def build(folder: Path) -> None:
        archive = Cpio()
        jobs = [(str(p), f"/{BOOT}/kvmnest/{p.relative_to(base)}", 2) for p in sources]
        for path, pyc in zip(sources, compile_sources(jobs), strict=True):
            archive.file(f"{BOOT}/kvmnest/{path.relative_to(base)}c", pyc)
        archive.file(INIT, _INIT)
        _save(folder, archive)

    contents = [path.read_bytes() for path in sources]
    return _layer("boot", cache.digest([FORMAT, sys.version, _INIT, *contents]), build)


BOOT = "kvmnest/boot"
INIT = "kvmnest/init.py"
_BOOT_MODULES = ("__init__.py", "kmsg.py", "lab/__init__.py", "lab/channel.py", "lab/guest.py")
# sys.path[0] is the script's folder; the guest's code uses that place for the command's.
_INIT = f"""import sys
sys.path[0] = "/{BOOT}"
from kvmnest.lab.guest import main
main()
""".encode()


@dataclass(frozen=True)
class Tree:
    """Files for the guest: path -> content, path -> modification time; ``key`` stands for all."""

    key: str
    files: dict[str, bytes]
    mtimes: dict[str, int]


def kvmnest_files() -> Tree:
    """kvmnest itself: sources (for failure output), compiled code, data.

    Python and pytest compare the modification times (seconds) with those in their caches.
    """
    build_if_stale()
    base = Path(kvmnest.__file__).parent
    left_out = {"__pycache__", "docs"}
    files = sorted(
        p for p in base.rglob("*") if p.is_file() and left_out.isdisjoint(p.relative_to(base).parts)
    )
    inside = {path: f"/{SITE}/kvmnest/{path.relative_to(base)}" for path in files}
    mtimes = {inside[p]: int(p.stat().st_mtime) for p in files}

    def build(folder: Path) -> None:
        contents = {name: path.read_bytes() for path, name in inside.items()}
        sources = [p for p in files if p.suffix == ".py"]
        jobs = [(str(p), inside[p], 0) for p in sources]
        for path, pyc in zip(sources, compile_sources(jobs), strict=True):
            cached = Path(importlib.util.cache_from_source(path.name)).name
            contents[f"{inside[path].rpartition('/')[0]}/__pycache__/{cached}"] = pyc
        by_pytest = [p for p in sources if any(p.is_relative_to(base / d) for d in REWRITTEN)]
        contents |= rewritten([(p, inside[p]) for p in by_pytest])
        (folder / "files").write_bytes(marshal.dumps(contents))

    key = cache.digest([FORMAT, sys.version, *_stamp(files), *(p.read_bytes() for p in files)])
    folder = cache.entry("kvmnest", key, build)
    return Tree(key, marshal.loads((folder / "files").read_bytes()), mtimes)


def job_layer(job: bytes) -> bytes:
    """The archive that brings the marshalled ``job`` to a guest that boots for one run."""
    archive = Cpio()
    archive.file("kvmnest/job", job)
    return archive.finish()
