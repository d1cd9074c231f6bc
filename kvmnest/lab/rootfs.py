"""The guest's file system, in layers: Python, its packages, kvmnest itself, the job.

Each layer is one cpio archive, cached by what it is made from; the kernel unpacks them one after
the other. The guest executes some 100 million instructions a second, hence: compiled code only
(no source positions, no docstrings in the standard library), stripped binaries, few big files.
"""

import fnmatch
import importlib.metadata
import importlib.util
import marshal
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import kvmnest
from kvmnest.lab import cache, tools
from kvmnest.lab.cpio import Cpio, names
from kvmnest.lab.errors import LabSetupError

FORMAT = 1  # bump when the content of a layer changes for the same inputs
SITE = "site"  # packages live here; PYTHONPATH names it
PYTHON = "usr/bin/python3"
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


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


_COMPILER = """
import marshal, sys
jobs = marshal.load(sys.stdin.buffer)
done = []
for path, name, level in jobs:
    with open(path, "rb") as f:
        source = f.read()
    try:
        code = compile(source, name, "exec", optimize=level, dont_inherit=True)
        done.append(marshal.dumps(code))
    except (SyntaxError, ValueError):
        done.append(b"")
marshal.dump(done, sys.stdout.buffer)
"""


def compile_sources(jobs: list[tuple[str, str, int]]) -> list[bytes]:
    """Compile (path, name in tracebacks, optimisation level) to .pyc images, in order.

    They have no column positions (a third less to load) and are "unchecked": the guest never
    compares them with a source. A file that is no valid Python gives b"".
    """
    shares = min(os.cpu_count() or 1, 4)
    command = [sys.executable, "-I", "-S", "-X", "no_debug_ranges", "-c", _COMPILER]
    workers = []
    for share in range(shares):
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert worker.stdin is not None
        marshal.dump(jobs[share::shares], worker.stdin)
        worker.stdin.close()
        workers.append(worker)
    results = [b""] * len(jobs)
    for share, worker in enumerate(workers):
        assert worker.stdout is not None
        output = worker.stdout.read()
        if worker.wait():
            raise LabSetupError(
                f"compiling Python for the guest failed (status {worker.returncode})"
            )
        results[share::shares] = marshal.loads(output)
    header = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)
    return [header + code if code else b"" for code in results]


_REWRITER = """
import ast, importlib.util, marshal, os, sys, tempfile
from pathlib import Path
from _pytest.assertion.rewrite import PYC_TAIL, _read_pyc, rewrite_asserts

def formats(source, mtime):
    # pytest checks the source by its hash (from 9 on) or by time and size.
    yield (3).to_bytes(4, "little") + importlib.util.source_hash(source)
    size = (len(source) & 0xFFFFFFFF).to_bytes(4, "little")
    yield bytes(4) + mtime.to_bytes(4, "little") + size

def accepted(path, pyc):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "x.pyc")
        target.write_bytes(pyc)
        return _read_pyc(Path(path), target) is not None

done = []
for path, name, mtime in marshal.load(sys.stdin.buffer):
    source = Path(path).read_bytes()
    tree = ast.parse(source, filename=name)
    rewrite_asserts(tree, source, name)
    code = marshal.dumps(compile(tree, name, "exec", dont_inherit=True))
    pycs = (importlib.util.MAGIC_NUMBER + stamp + code for stamp in formats(source, mtime))
    done.append(next(pyc for pyc in pycs if accepted(path, pyc)))
marshal.dump((PYC_TAIL, done), sys.stdout.buffer)
"""


def rewritten(files: list[tuple[Path, str]]) -> dict[str, bytes]:
    """Compile (path, guest path) as pytest rewrites it: cache file name -> content.

    Rewriting the suite's assertions in the guest takes ten times as long as running it. A pytest
    that does not offer the function this needs gives {}, and the guest rewrites.
    """
    jobs = [(str(path), name, int(path.stat().st_mtime) & 0xFFFFFFFF) for path, name in files]
    done = subprocess.run(
        [sys.executable, "-X", "no_debug_ranges", "-c", _REWRITER],
        input=marshal.dumps(jobs),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return {}
    tail, results = marshal.loads(done.stdout)
    return {
        f"{name.rpartition('/')[0]}/__pycache__/{path.stem}{tail}": pyc
        for (path, name), pyc in zip(files, results, strict=True)
    }


def _stripped(path: Path) -> bytes:
    """The ELF file without symbols, which the guest would only copy around."""
    with tempfile.NamedTemporaryFile(prefix="kvmnest-") as target:
        tools.run(["strip", "-o", target.name, str(path)], f"strip {path}")
        return Path(target.name).read_bytes()


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


def _libraries(loader: str, binary: Path) -> list[Path]:
    """Shared libraries that ``binary`` loads, resolved by the loader itself."""
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


def python_layer() -> bytes:
    """Interpreter, standard library, shared libraries."""
    exe, loader = _interpreter_and_loader()
    sources, extensions = list(_stdlib_files()), _extension_files()
    inputs = [exe, Path(loader), *(p for _, p in sources), *extensions]

    def build(folder: Path) -> None:
        archive = Cpio()
        for name in ("proc", "sys", "dev", "tmp", "run", "root"):
            archive.directory(name)
        archive.device("dev/console", 5, 1)
        archive.file(loader.lstrip("/"), _stripped(Path(loader).resolve()), 0o755)
        archive.file(PYTHON, _stripped(exe), 0o755)
        archive.symlink("usr/bin/python", "python3")
        archive.symlink(f"usr/bin/{Path(_STDLIB).name}", "python3")
        libraries = {
            lib.name: lib for binary in (exe, *extensions) for lib in _libraries(loader, binary)
        }
        for name, path in sorted(libraries.items()):
            archive.file(f"lib/{name}", _stripped(path.resolve()), 0o755)
        for path in extensions:
            archive.file(f"{_STDLIB}/lib-dynload/{path.name}", _stripped(path), 0o755)
        _add_pycs(archive, _STDLIB, sources, 2)
        _save(folder, archive)

    key = cache.digest([FORMAT, sys.version, *_stamp(inputs)])
    return (cache.entry("python", key, build) / "layer.cpio").read_bytes()


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


def site_layer() -> bytes:
    """The packages that kvmnest runs on: compiled modules, extension modules, entry points."""
    _, loader = _interpreter_and_loader()
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
                archive.file(f"{SITE}/{name}", _stripped(path), 0o755)
                libraries |= {lib.name: lib for lib in _libraries(loader, path)}
            elif not name.endswith(".py"):
                archive.file(f"{SITE}/{name}", path.read_bytes())
        inside = {Path(n).name for n in files} | {Path(n).name for n in names(python_layer())}
        for name, path in sorted(libraries.items()):
            if name not in inside:
                archive.file(f"lib/{name}", _stripped(path.resolve()), 0o755)
        _add_pycs(archive, SITE, python, 0)
        _save(folder, archive)

    key = cache.digest([FORMAT, sys.version, *sorted(files), *_stamp(files.values())])
    return (cache.entry("site", key, build) / "layer.cpio").read_bytes()


def kvmnest_layer() -> bytes:
    """kvmnest itself: sources (for failure output), compiled code, data."""
    base = Path(kvmnest.__file__).parent
    files = sorted(p for p in base.rglob("*") if p.is_file() and "__pycache__" not in p.parts)

    def build(folder: Path) -> None:
        archive = Cpio()
        sources = [p for p in files if p.suffix == ".py"]
        for path in files:
            name = f"{SITE}/kvmnest/{path.relative_to(base)}"
            archive.file(name, path.read_bytes(), mtime=int(path.stat().st_mtime))
        jobs = [(str(p), f"/{SITE}/kvmnest/{p.relative_to(base)}", 0) for p in sources]
        for path, pyc in zip(sources, compile_sources(jobs), strict=True):
            where = path.parent.relative_to(base)
            cached = Path(importlib.util.cache_from_source(path.name)).name
            archive.file(f"{SITE}/kvmnest/{where}/__pycache__/{cached}".replace("/./", "/"), pyc)
        by_pytest = [p for p in sources if p.relative_to(base).parts[0] in ("suite", "plugin")]
        asserts = [(p, f"/{SITE}/kvmnest/{p.relative_to(base)}") for p in by_pytest]
        for name, pyc in rewritten(asserts).items():
            archive.file(name.lstrip("/"), pyc)
        archive.file("kvmnest/init.py", _INIT)
        _save(folder, archive)

    key = cache.digest([FORMAT, sys.version, *_stamp(files), *(p.read_bytes() for p in files)])
    return (cache.entry("kvmnest", key, build) / "layer.cpio").read_bytes()


_INIT = f"""import sys
sys.path.append("/{SITE}")
from kvmnest.lab.guest import main
main()
""".encode()


def job_layer(job: dict[str, object], files: dict[str, bytes]) -> bytes:
    """What this run does: the marshalled ``job`` and extra ``files`` (guest path -> content)."""
    archive = Cpio()
    archive.file("kvmnest/job", marshal.dumps(job))
    for name, content in files.items():
        archive.file(name.lstrip("/"), content)
    return archive.finish()
